//! Python bindings: conversions, errors, signals and the GIL. The other modules contain the algorithms.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyUnicodeDecodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::Error;
use crate::bpe::{Id, train};
use crate::count::{Batch, count_chunks};
use crate::scan::{DEFAULT_PATTERN, Splitter};
use crate::vocabulary::Vocabulary;

/// A batch is sent to the workers when it has this many bytes, or `buffer_size` texts.
const BATCH_BYTES: usize = 1 << 20;
const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.0)
    }
}

fn n_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// Copy the text: as_str() would cache a UTF-8 copy inside every non-ASCII string for its lifetime.
fn copy_text(item: &Bound<'_, PyAny>) -> PyResult<String> {
    let Ok(string) = item.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("expected texts of type str, got {}", item.repr()?)));
    };
    let bytes = string.encode_utf8()?;
    Ok(String::from_utf8(bytes.as_bytes().to_vec())?)
}

/// Send the texts of `iterator` in batches. Python signals are checked between batches, because the iterator
/// may run no Python code.
fn feed(iterator: &Bound<'_, PyIterator>, buffer_size: usize, sender: &SyncSender<Batch>) -> PyResult<()> {
    let py = iterator.py();
    let mut batch = Batch::new();
    let mut n_bytes = 0;
    for item in iterator {
        let text = copy_text(&item?)?;
        n_bytes += text.len();
        batch.push(text);
        if batch.len() >= buffer_size || n_bytes >= BATCH_BYTES {
            let full = std::mem::take(&mut batch);
            n_bytes = 0;
            py.check_signals()?;
            if py.detach(|| sender.send(full)).is_err() {
                return Ok(());
            }
        }
    }
    // Sending fails only if a worker has failed, and the worker's error is the one to report.
    let _ = py.detach(|| sender.send(batch));
    Ok(())
}

/// A byte-level BPE tokenizer. Before training its vocabulary is the 256 bytes.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    pattern: String,
    splitter: Splitter,
    vocabulary: Vocabulary,
}

impl Tokenizer {
    fn encode_text(&self, text: &str) -> Result<Vec<Id>, Error> {
        let mut ids = Vec::new();
        self.splitter.split(text, |chunk| self.vocabulary.encode_chunk(chunk, &mut ids))?;
        Ok(ids)
    }

    /// Encode on all cores; each worker takes the next text in the list.
    fn encode_texts(&self, texts: &[String]) -> Result<Vec<Vec<Id>>, Error> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut encoded = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(text) = texts.get(index) else { return Ok(encoded) };
                encoded.push((index, self.encode_text(text)?));
            }
        };
        let mut all = vec![Vec::new(); texts.len()];
        thread::scope(|scope| {
            let workers: Vec<_> = (0..n_threads().min(texts.len())).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                for (index, ids) in worker.join().unwrap_or_else(|panic| resume_unwind(panic))? {
                    all[index] = ids;
                }
            }
            Ok(all)
        })
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self {
            pattern: DEFAULT_PATTERN.into(),
            splitter: Splitter::new(DEFAULT_PATTERN)?,
            vocabulary: Vocabulary::new(Vec::new()),
        })
    }

    /// Learn a vocabulary of `vocab_size` tokens, or fewer if the texts have no more pairs to merge.
    ///
    /// Texts are read in batches of `buffer_size` texts or 1 MiB, whichever is reached first, and counted on
    /// all cores. `pattern` is a regular expression whose matches are the chunks; merges do not cross chunks.
    /// None means GPT-4's pattern. If training fails, the tokenizer does not change.
    #[pyo3(signature = (iterator, vocab_size, buffer_size = 8192, pattern = None))]
    fn train_from_iterator(
        slf: &Bound<'_, Self>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        if vocab_size < 256 {
            let rule = "must be at least 256: every byte is a token; 32768 is usual";
            return Err(Error(format!("vocab_size={vocab_size} {rule}")).into());
        }
        if buffer_size < 1 {
            return Err(
                Error(format!("buffer_size={buffer_size} must be at least 1; 8192 is the default")).into()
            );
        }
        let pattern = pattern.unwrap_or(DEFAULT_PATTERN);
        let splitter = Splitter::new(pattern)?;
        let iterator = iterator.try_iter()?.unbind();

        let merges = slf.py().detach(|| {
            let chunks = count_chunks(&splitter, n_threads(), |sender| {
                Python::attach(|py| feed(iterator.bind(py), buffer_size as usize, &sender))
            })?;
            let mut last_poll = Instant::now();
            train(chunks, (vocab_size - 256) as usize, || {
                if last_poll.elapsed() < POLL_INTERVAL {
                    return Ok(());
                }
                last_poll = Instant::now();
                Python::attach(|py| py.check_signals())
            })
        })?;
        let trained = Self { pattern: pattern.into(), splitter, vocabulary: Vocabulary::new(merges) };
        *slf.try_borrow_mut()? = trained;
        Ok(())
    }

    /// Return the split pattern.
    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// Return every token's bytes and its id, which is also its rank in tiktoken's sense.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, Id)> {
        self.vocabulary.tokens().iter().map(|token| PyBytes::new(py, token)).zip(0..).collect()
    }

    /// Number of tokens, including the 256 bytes.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocabulary.tokens().len()
    }

    /// Return the token ids of a text.
    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<Id>> {
        let text = copy_text(text)?;
        Ok(py.detach(|| self.encode_text(&text))?)
    }

    /// Return the token ids of each text, using all cores.
    fn batch_encode(&self, py: Python<'_>, texts: Vec<Bound<'_, PyAny>>) -> PyResult<Vec<Vec<Id>>> {
        let texts = texts.iter().map(copy_text).collect::<PyResult<Vec<_>>>()?;
        Ok(py.detach(|| self.encode_texts(&texts))?)
    }

    /// Return the text of token ids; raise UnicodeDecodeError, a ValueError, for invalid UTF-8.
    fn decode(&self, py: Python<'_>, ids: Vec<i64>) -> PyResult<String> {
        let tokens = self.vocabulary.tokens();
        let mut bytes = Vec::new();
        for id in ids {
            let token = usize::try_from(id).ok().and_then(|index| tokens.get(index)).ok_or_else(|| {
                Error(format!(
                    "unknown token id {id}: the ids of this vocabulary are 0 to {}",
                    tokens.len() - 1
                ))
            })?;
            bytes.extend_from_slice(token);
        }
        String::from_utf8(bytes).map_err(|error| {
            match PyUnicodeDecodeError::new_utf8(py, error.as_bytes(), error.utf8_error()) {
                Ok(decode_error) => PyErr::from_value(decode_error.into_any()),
                Err(other) => other,
            }
        })
    }
}

#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;
}
