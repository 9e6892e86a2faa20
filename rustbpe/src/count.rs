//! Counting the distinct chunks of a stream of texts on several threads.
//!
//! Batches of texts pass through a short queue to workers, each with its own map; the maps are merged at the
//! end. So reading overlaps with counting, and memory grows with the distinct chunks, not with the text.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::Error;
use crate::chunks::{ChunkMap, Counter};
use crate::scan::Splitter;

pub type Batch = Vec<String>;

/// Count the chunks of all batches that `feed` sends. A failed send means that a worker had an error: `feed`
/// should return, and this function returns the worker's error.
pub fn count_chunks<E: From<Error>>(
    splitter: &Splitter,
    n_threads: usize,
    feed: impl FnOnce(SyncSender<Batch>) -> Result<(), E>,
) -> Result<ChunkMap<u64>, E> {
    let (sender, receiver) = sync_channel(n_threads);
    let queue = Queue(Mutex::new(Some(receiver)));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(|| count_queue(splitter, &queue))).collect();
        feed(sender)?;
        let mut total = ChunkMap::default();
        for worker in workers {
            total = total.merge(worker.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        }
        Ok(total)
    })
}

fn count_queue(splitter: &Splitter, queue: &Queue) -> Result<ChunkMap<u64>, Error> {
    let mut counter = Counter::default();
    while let Some(batch) = queue.next() {
        for text in batch {
            splitter.split(&text, |chunk| counter.add(chunk)).inspect_err(|_| queue.close())?;
        }
    }
    Ok(counter.finish())
}

struct Queue(Mutex<Option<Receiver<Batch>>>);

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Option<Receiver<Batch>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait for a batch; return None if the sender is dropped or the queue is closed.
    fn next(&self) -> Option<Batch> {
        self.lock().as_ref()?.recv().ok()
    }

    fn close(&self) {
        *self.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(pattern: &str, n_threads: usize, batches: Vec<Batch>) -> Result<Vec<(Vec<u8>, u64)>, Error> {
        let counts = count_chunks(&Splitter::new(pattern)?, n_threads, |sender| {
            let _ = batches.into_iter().try_for_each(|batch| sender.send(batch));
            Ok(())
        })?;
        let mut all = Vec::new();
        counts.for_each(|chunk, count| all.push((chunk.to_vec(), count)));
        all.sort();
        Ok(all)
    }

    #[test]
    fn counts_do_not_depend_on_threads_and_batches() {
        let texts: Vec<String> = (0..1000).map(|n| format!("{} {n} {}", n % 7, n % 13)).collect();
        let expected = count(r"\d+", 1, vec![texts.clone()]).unwrap();
        assert_eq!(expected.iter().map(|(_, count)| count).sum::<u64>(), 3000);
        for n_threads in [1, 2, 5] {
            for size in [1, 7, 999] {
                let batches = texts.chunks(size).map(<[String]>::to_vec).collect();
                assert_eq!(count(r"\d+", n_threads, batches).unwrap(), expected);
            }
        }
    }

    /// Sends more batches than the queue holds: if it stayed open without a reader, sending would block
    /// forever.
    #[test]
    fn a_failed_worker_stops_the_feed() {
        let batches = vec![vec!["ab".repeat(1000)]; 100];
        let error = count(r"(?:a|b|ab)*(?!c)bc", 2, batches).unwrap_err();
        assert!(error.0.contains("failed on a text"), "{error:?}");
    }
}
