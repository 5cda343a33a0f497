//! Files of records, good and bad.
