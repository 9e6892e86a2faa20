//! A hash map for millions of chunks, which are short byte strings.
//!
//! Nearly all chunks have at most 15 bytes. Those are packed with their length into two machine words, so
//! that a key is compared in two instructions, hashed in a few, and stored without an allocation.

use rustc_hash::FxHashMap;

type Packed = (u64, u64);

#[derive(Debug, Default)]
pub struct ChunkMap<V> {
    short: FxHashMap<Packed, V>,
    long: FxHashMap<Box<[u8]>, V>,
}

/// Pack the bytes in little-endian order, with the length in the last byte; None for more than 15 bytes.
#[inline]
fn pack(chunk: &[u8]) -> Option<Packed> {
    let length = chunk.len();
    let tagged = (length as u64) << 56;
    if let (Some(head), Some(tail)) = (chunk.first_chunk::<8>(), chunk.last_chunk::<8>()) {
        // Bytes 8.. of the chunk are the top bytes of its last word. Two shifts, because one by 64 overflows.
        let rest = (u64::from_le_bytes(*tail) >> 8) >> (8 * (15 - length.min(15)));
        (length < 16).then_some((u64::from_le_bytes(*head), rest | tagged))
    } else if let (Some(head), Some(tail)) = (chunk.first_chunk::<4>(), chunk.last_chunk::<4>()) {
        let rest = u64::from(u32::from_le_bytes(*tail)) << (8 * (length - 4));
        Some((u64::from(u32::from_le_bytes(*head)) | rest, tagged))
    } else {
        let word = chunk.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        Some((word, tagged))
    }
}

fn unpack(packed: Packed) -> ([u8; 16], usize) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&packed.0.to_le_bytes());
    bytes[8..].copy_from_slice(&packed.1.to_le_bytes());
    (bytes, usize::from(bytes[15]))
}

impl<V: Copy> ChunkMap<V> {
    #[inline]
    pub fn get(&self, chunk: &[u8]) -> Option<V> {
        match pack(chunk) {
            Some(packed) => self.short.get(&packed).copied(),
            None => self.long.get(chunk).copied(),
        }
    }

    pub fn insert(&mut self, chunk: &[u8], value: V) {
        match pack(chunk) {
            Some(packed) => self.short.insert(packed, value),
            None => self.long.insert(chunk.into(), value),
        };
    }

    pub fn for_each(&self, mut visit: impl FnMut(&[u8], V)) {
        for (&packed, &value) in &self.short {
            let (bytes, length) = unpack(packed);
            visit(&bytes[..length], value);
        }
        for (chunk, &value) in &self.long {
            visit(chunk, value);
        }
    }
}

impl ChunkMap<u64> {
    fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// Return the sum of two maps of counts.
    pub fn merge(self, other: Self) -> Self {
        let (mut larger, smaller) = if self.len() < other.len() { (other, self) } else { (self, other) };
        for (packed, count) in smaller.short {
            *larger.short.entry(packed).or_default() += count;
        }
        for (chunk, count) in smaller.long {
            *larger.long.entry(chunk).or_default() += count;
        }
        larger
    }
}

/// Number of chunks buffered before they are counted in the map: consecutive lookups overlap their cache
/// misses, which takes a third less time than lookups between the branches of a scanner.
const PENDING: usize = 256;

/// A counter of chunks.
#[derive(Default)]
pub struct Counter {
    counts: ChunkMap<u64>,
    pending: Vec<Packed>,
}

impl Counter {
    #[inline]
    pub fn add(&mut self, chunk: &[u8]) {
        if let Some(packed) = pack(chunk) {
            self.pending.push(packed);
            if self.pending.len() == PENDING {
                self.flush();
            }
        } else if let Some(count) = self.counts.long.get_mut(chunk) {
            *count += 1;
        } else {
            self.counts.insert(chunk, 1);
        }
    }

    #[inline(never)]
    fn flush(&mut self) {
        for packed in self.pending.drain(..) {
            *self.counts.short.entry(packed).or_default() += 1;
        }
    }

    pub fn finish(mut self) -> ChunkMap<u64> {
        self.flush();
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(map: &ChunkMap<u64>) -> Vec<(Vec<u8>, u64)> {
        let mut all = Vec::new();
        map.for_each(|chunk, count| all.push((chunk.to_vec(), count)));
        all.sort();
        all
    }

    /// Packed and unpacked lengths, and keys that differ only in length or in one byte.
    #[test]
    fn chunks_of_every_length_are_distinct() {
        let mut expected = Vec::new();
        for length in 1..40 {
            for changed in 0..length {
                let mut chunk = vec![0; length];
                chunk[changed] = 7;
                expected.push((chunk, 1 + (length * changed) as u64));
            }
            expected.push((vec![0; length], 2));
        }
        let mut counter = Counter::default();
        for (chunk, count) in &expected {
            (0..*count).for_each(|_| counter.add(chunk));
        }
        expected.sort();
        assert_eq!(contents(&counter.finish()), expected);
    }

    #[test]
    fn merging_adds_counts() {
        let mut halves = [Counter::default(), Counter::default()];
        halves[0].add(b"a");
        for chunk in [&b"a"[..], b"b", b"a chunk that is not packed"] {
            halves.iter_mut().for_each(|half| half.add(chunk));
        }
        let [left, right] = halves.map(Counter::finish);
        let expected = [(b"a".to_vec(), 3), (b"a chunk that is not packed".to_vec(), 2), (b"b".to_vec(), 2)];
        assert_eq!(contents(&left.merge(right)), expected);
    }
}
