//! Byte-pair encoding: learning merges from chunk counts.
//!
//! Training starts from bytes and repeats M times: merge the most frequent pair of adjacent tokens over all
//! chunks (Sennrich et al., 2016, on bytes as in GPT-2). Among equally frequent pairs the smallest by (left
//! id, right id) wins, so the result depends on the counts alone. Three ideas reduce time and memory:
//!
//! - Boundary tags. All chunks are stored in one array with a slot per byte, and a token's id is written to
//!   the first and the last slot of its span. Both neighbours of a token are then one addition away, and a
//!   merge is two writes. There are no linked lists, and a position takes 4 bytes.
//! - A floor. A chunk seen n times contains a pair seen n times until it is a single token. So while there
//!   are fewer merges than chunks seen at least n times, the best pair has a count of at least n: pairs below
//!   the count of the M-th most frequent chunk are never chosen, and are not stored.
//! - Sorted positions. All positions of a pair are recorded in ascending order in the step that creates its
//!   newer token; later merges only invalidate some of them, which the tags reveal. With the chunks sorted by
//!   count, a single cursor gives the weight of each position, without an index of chunks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::Error;
use crate::chunks::ChunkMap;

pub type Id = u32;
pub type Pair = (Id, Id);

/// Value of the slot between two chunks.
pub(crate) const EDGE: Id = Id::MAX;
/// Value of the first slot of a token that has become the right part of a longer one.
const INSIDE: Id = Id::MAX - 1;

/// Tokens over bytes, as boundary tags: an EDGE, then each chunk followed by an EDGE.
pub(crate) struct Tags(pub Vec<Id>);

impl Tags {
    /// Return true if the `left` that was recorded at `at` still exists and is followed by `right`.
    ///
    /// The tag at `at` cannot be the end of another token. Spans only grow: a token that ends at `at` without
    /// starting there excludes that a longer `left` ever started there, and merges overwrite one-byte spans.
    pub fn holds(&self, (left, right): Pair, at: usize, left_len: usize) -> bool {
        self.0[at] == left && self.0[at + left_len] == right
    }

    pub fn join(&mut self, at: usize, left_len: usize, new_len: usize, new: Id) {
        self.0[at] = new;
        self.0[at + left_len] = INSIDE;
        self.0[at + new_len - 1] = new;
    }
}

/// All distinct chunks of at least two bytes, the most frequent first.
struct Corpus {
    tags: Tags,
    /// (first slot after the chunks with this count, count), in ascending order of slots.
    runs: Vec<(usize, u64)>,
    /// Lower bound on the count of every pair that the requested merges choose.
    floor: u64,
}

impl Corpus {
    fn new(chunks: ChunkMap<u64>, n_merges: usize) -> Result<Self, Error> {
        // A counting sort: compute the size of each count, then the start of its slots, then copy the chunks.
        let mut sizes: FxHashMap<u64, (usize, usize)> = FxHashMap::default();
        chunks.for_each(|chunk, count| {
            if chunk.len() > 1 {
                let (n_chunks, n_slots) = sizes.entry(count).or_default();
                *n_chunks += 1;
                *n_slots += chunk.len() + 1;
            }
        });
        let mut counts: Vec<u64> = sizes.keys().copied().collect();
        counts.sort_unstable_by_key(|&count| Reverse(count));

        let (mut n_chunks, mut n_slots, mut floor) = (0, 1, 1);
        let mut runs = Vec::with_capacity(counts.len());
        let mut starts: FxHashMap<u64, usize> = FxHashMap::default();
        for count in counts {
            let size = sizes[&count];
            starts.insert(count, n_slots);
            if n_chunks < n_merges && n_chunks + size.0 >= n_merges {
                floor = count;
            }
            n_chunks += size.0;
            n_slots += size.1;
            runs.push((n_slots, count));
        }
        if n_slots >= INSIDE as usize {
            return Err(Error(format!(
                "the distinct chunks need {n_slots} slots, which must be below 2^32 - 2; train on less text"
            )));
        }

        let mut tags = vec![EDGE; n_slots];
        chunks.for_each(|chunk, count| {
            if let Some(start) = starts.get_mut(&count).filter(|_| chunk.len() > 1) {
                for (tag, &byte) in tags[*start..].iter_mut().zip(chunk) {
                    *tag = Id::from(byte);
                }
                *start += chunk.len() + 1;
            }
        });
        Ok(Self { tags: Tags(tags), runs, floor })
    }
}

/// Returns the weight of positions, which must be queried in ascending order.
struct Cursor<'c>(&'c [(usize, u64)]);

impl Cursor<'_> {
    #[inline]
    fn weight(&mut self, at: usize) -> u64 {
        if at >= self.0[0].0 {
            self.0 = &self.0[self.0.partition_point(|run| run.0 <= at)..];
        }
        self.0[0].1
    }
}

/// A pair's count over all chunks, and all its positions at the time when its newer token was created.
#[derive(Default, Clone)]
struct Sites {
    count: u64,
    positions: Vec<u32>,
}

impl Sites {
    #[inline]
    fn add(&mut self, at: usize, weight: u64) {
        self.count += weight;
        self.positions.push(at as u32);
    }
}

/// The tokens on one side of the token being created, with their positions.
#[derive(Default)]
struct Neighbours {
    sites: Vec<Sites>, // by token id
    seen: Vec<Id>,
}

impl Neighbours {
    #[inline]
    fn add(&mut self, neighbour: Id, at: usize, weight: u64) {
        let sites = &mut self.sites[neighbour as usize];
        if sites.count == 0 {
            self.seen.push(neighbour);
        }
        sites.add(at, weight);
    }
}

#[derive(Default)]
struct Pairs {
    sites: FxHashMap<Pair, Sites>,
    /// Every stored pair with an upper bound on its count: counts only decrease after insertion.
    queue: BinaryHeap<(u64, Reverse<Pair>)>,
    floor: u64,
}

impl Pairs {
    fn of_bytes(corpus: &Corpus) -> Self {
        let mut pairs = Self { floor: corpus.floor, ..Self::default() };
        let mut table = vec![Sites::default(); 1 << 16];
        let mut cursor = Cursor(&corpus.runs);
        for (at, window) in corpus.tags.0.windows(2).enumerate() {
            if window[0] != EDGE && window[1] != EDGE {
                table[(window[0] << 8 | window[1]) as usize].add(at, cursor.weight(at));
            }
        }
        for (index, sites) in (0..).zip(table) {
            pairs.insert((index >> 8, index & 255), sites);
        }
        pairs
    }

    fn insert(&mut self, pair: Pair, mut sites: Sites) {
        if sites.count >= self.floor {
            sites.positions.shrink_to_fit();
            self.queue.push((sites.count, Reverse(pair)));
            self.sites.insert(pair, sites);
        }
    }

    /// Record that occurrences of `old` have become occurrences of `new`.
    fn replace(&mut self, old: Pair, new: Pair, sites: Sites) {
        if let Some(old_sites) = self.sites.get_mut(&old) {
            old_sites.count -= sites.count;
        }
        self.insert(new, sites);
    }

    fn pop_most_frequent(&mut self) -> Option<(Pair, Sites)> {
        while let Some((queued_count, Reverse(pair))) = self.queue.pop() {
            let count = self.sites.get(&pair)?.count;
            if count == queued_count || count < self.floor {
                let sites = self.sites.remove(&pair)?;
                if count >= self.floor {
                    return Some((pair, sites));
                }
            } else {
                self.queue.push((count, Reverse(pair)));
            }
        }
        None
    }
}

/// Learn `n_merges` merges from the counts of the chunks, or fewer if no pair is left.
///
/// Merge i joins the two tokens of its pair into token 256 + i. `poll` is called before each merge and can
/// stop the training with an error.
pub fn train<E: From<Error>>(
    chunks: ChunkMap<u64>,
    n_merges: usize,
    mut poll: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut corpus = Corpus::new(chunks, n_merges)?;
    let mut pairs = Pairs::of_bytes(&corpus);
    let tags = &mut corpus.tags;
    let (mut before, mut after) = (Neighbours::default(), Neighbours::default());
    let mut lengths = vec![1; 256]; // of tokens, in bytes
    let mut merges = Vec::new();
    while merges.len() < n_merges {
        let Some((pair, sites)) = pairs.pop_most_frequent() else { break };
        poll()?;
        let new = lengths.len() as Id;
        let left_len: usize = lengths[pair.0 as usize];
        let new_len = left_len + lengths[pair.1 as usize];
        lengths.push(new_len);
        merges.push(pair);
        before.sites.resize_with(lengths.len(), Sites::default);
        after.sites.resize_with(lengths.len(), Sites::default);

        let mut cursor = Cursor(&corpus.runs);
        for at in sites.positions.into_iter().map(|at| at as usize) {
            if !tags.holds(pair, at, left_len) {
                continue;
            }
            tags.join(at, left_len, new_len, new);
            let weight = cursor.weight(at);
            let (previous, next) = (tags.0[at - 1], tags.0[at + new_len]);
            if previous != EDGE {
                before.add(previous, at - lengths[previous as usize], weight);
            }
            if next != EDGE {
                after.add(next, at, weight);
            }
        }
        // The order matters where the pair repeats (abab): `before` corrects what `after` counted for the
        // second a.
        for next in after.seen.drain(..) {
            pairs.replace((pair.1, next), (new, next), std::mem::take(&mut after.sites[next as usize]));
        }
        for previous in before.seen.drain(..) {
            pairs.replace(
                (previous, pair.0),
                (previous, new),
                std::mem::take(&mut before.sites[previous as usize]),
            );
        }
    }
    Ok(merges)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::chunks::Counter;

    type Words = Vec<(Vec<Id>, u64)>;

    pub fn join_all(word: &[Id], pair: Pair, new: Id) -> Vec<Id> {
        let mut joined = Vec::new();
        let mut rest = word;
        while let [first, tail @ ..] = rest {
            let found = tail.first().is_some_and(|&second| (*first, second) == pair);
            joined.push(if found { new } else { *first });
            rest = if found { &tail[1..] } else { tail };
        }
        joined
    }

    /// The definition: recount all pairs for each merge; the largest count wins, the smaller pair among
    /// equals.
    fn train_naively(mut words: Words, n_merges: usize) -> Vec<Pair> {
        let mut merges = Vec::new();
        while merges.len() < n_merges {
            let mut counts: FxHashMap<Pair, u64> = FxHashMap::default();
            for (word, count) in &words {
                for pair in word.windows(2) {
                    *counts.entry((pair[0], pair[1])).or_default() += count;
                }
            }
            let best = counts.into_iter().map(|(pair, count)| (count, Reverse(pair))).max();
            let Some((_, Reverse(pair))) = best else { break };
            let new = 256 + merges.len() as Id;
            words.iter_mut().for_each(|(word, _)| *word = join_all(word, pair, new));
            merges.push(pair);
        }
        merges
    }

    /// Return chunks of two or three different letters, with many runs, overlaps and ties.
    pub fn random_chunks(seed: u64) -> Vec<Vec<u8>> {
        let mut state = seed;
        let mut next = move |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let n_letters = 2 + next(2);
        (0..200)
            .map(|_| {
                let longest = if next(10) == 0 { 30 } else { 6 };
                let length = 1 + next(longest);
                (0..length).map(|_| b'a' + next(n_letters) as u8).collect()
            })
            .collect()
    }

    pub fn train_on(chunks: &[Vec<u8>], n_merges: usize) -> Vec<Pair> {
        let mut counter = Counter::default();
        chunks.iter().for_each(|chunk| counter.add(chunk));
        train::<Error>(counter.finish(), n_merges, || Ok(())).unwrap()
    }

    pub fn bytes(chunk: &[u8]) -> Vec<Id> {
        chunk.iter().copied().map(Id::from).collect()
    }

    #[test]
    fn training_equals_the_definition() {
        for seed in 0..60 {
            let chunks = random_chunks(seed);
            let words: Words = chunks.iter().map(|chunk| (bytes(chunk), 1)).collect();
            for n_merges in [0, 1, 5, 40, 10_000] {
                assert_eq!(
                    train_on(&chunks, n_merges),
                    train_naively(words.clone(), n_merges),
                    "seed {seed}"
                );
            }
        }
    }

    #[test]
    fn polling_stops_the_training() {
        let mut counter = Counter::default();
        counter.add(b"abcd");
        let mut n_polls = 0;
        let stopped = train(counter.finish(), 3, || {
            n_polls += 1;
            if n_polls == 2 { Err(Error("stop".into())) } else { Ok(()) }
        });
        assert_eq!(stopped.unwrap_err().0, "stop");
    }
}
