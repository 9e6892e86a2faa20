//! Byte-pair encoding: applying merges, from bytes to token ids and back.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::bpe::{EDGE, Id, Pair, Tags};
use crate::chunks::ChunkMap;

/// The tokens of a trained tokenizer: 256 bytes, then one for each merge.
#[derive(Debug)]
pub struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    ids: ChunkMap<Id>,
    merges: Vec<Pair>,
    ranks: FxHashMap<Pair, Id>,
}

impl Vocabulary {
    pub fn new(merges: Vec<Pair>) -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in &merges {
            tokens.push([tokens[left as usize].as_slice(), &tokens[right as usize]].concat());
        }
        let mut ids = ChunkMap::default();
        for (id, token) in (0..).zip(&tokens) {
            ids.insert(token, id);
        }
        let ranks = (256..).zip(&merges).map(|(id, &pair)| (pair, id)).collect();
        Self { tokens, ids, merges, ranks }
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    /// Append the tokens of one chunk to `ids`.
    pub fn encode_chunk(&self, chunk: &[u8], ids: &mut Vec<Id>) {
        match self.ids.get(chunk) {
            // Training and encoding merge in the same order, so a chunk that equals a token is always encoded
            // as that token.
            Some(id) => ids.push(id),
            None => self.merge(chunk, ids),
        }
    }

    /// Merge pairs in the order of training, leftmost first among equal pairs: O(n log n) for n bytes.
    fn merge(&self, chunk: &[u8], ids: &mut Vec<Id>) {
        let mut tags = Vec::with_capacity(chunk.len() + 2);
        tags.push(EDGE);
        tags.extend(chunk.iter().copied().map(Id::from));
        tags.push(EDGE);
        let mut tags = Tags(tags);

        let length = |id: Id| self.tokens[id as usize].len();
        let candidate = |pair: Pair, at: usize| self.ranks.get(&pair).map(|&id| Reverse((id, at)));
        let byte_pairs = tags.0.windows(2).enumerate();
        let mut queue: BinaryHeap<_> =
            byte_pairs.filter_map(|(at, pair)| candidate((pair[0], pair[1]), at)).collect();
        while let Some(Reverse((new, at))) = queue.pop() {
            let pair = self.merges[new as usize - 256];
            if !tags.holds(pair, at, length(pair.0)) {
                continue;
            }
            tags.join(at, length(pair.0), length(new), new);
            let (previous, next) = (tags.0[at - 1], tags.0[at + length(new)]);
            if previous != EDGE {
                queue.extend(candidate((previous, new), at - length(previous)));
            }
            queue.extend(candidate((new, next), at));
        }

        let mut at = 1;
        while tags.0[at] != EDGE {
            ids.push(tags.0[at]);
            at += length(tags.0[at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpe::tests::{bytes, join_all, random_chunks, train_on};

    #[test]
    fn encoding_applies_the_merges_in_order() {
        for seed in 0..60 {
            let vocabulary = Vocabulary::new(train_on(&random_chunks(seed), 40));
            for chunk in random_chunks(seed + 1000) {
                let merges = (256..).zip(&vocabulary.merges);
                let expected = merges.fold(bytes(&chunk), |word, (new, &pair)| join_all(&word, pair, new));
                let mut ids = Vec::new();
                vocabulary.encode_chunk(&chunk, &mut ids);
                assert_eq!(ids, expected, "{chunk:?}");
            }
        }
    }

    /// An export by bytes would lose tokens with equal bytes.
    #[test]
    fn no_two_tokens_have_equal_bytes() {
        for seed in 0..60 {
            let mut tokens = Vocabulary::new(train_on(&random_chunks(seed), 10_000)).tokens;
            let n_tokens = tokens.len();
            tokens.sort();
            tokens.dedup();
            assert_eq!(tokens.len(), n_tokens);
        }
    }
}
