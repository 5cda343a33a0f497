//! The grader against labelled answers, conventions and hostile input.
mod conventions;
mod hostile;
mod labelled;
mod s1;
