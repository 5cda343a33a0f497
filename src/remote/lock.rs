//! A mutex whose holder panicked holds what it held.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The value, whoever had it before.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
