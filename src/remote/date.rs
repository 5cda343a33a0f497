//! How long a server wants to be left alone: `Retry-After`, in seconds or as a date.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use std::time::Duration;

/// The wait a `Retry-After` asks for, at most `longest`. `date`: the reply's own `Date`, by whose clock
/// the other date is meant; ours (`now`, seconds since 1970) may stand elsewhere. A moment in the past and what
/// nobody can read ask for nothing.
pub fn retry_after(value: &str, date: Option<&str>, now: u64, longest: Duration) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        let wait =
            (seconds.is_finite() && seconds > 0.0).then(|| Duration::from_secs_f64(seconds.min(longest.as_secs_f64())));
        // Less than a nanosecond is no word about waiting.
        return wait.filter(|wait| !wait.is_zero());
    }
    let then = seconds_of(value)?;
    let now = date.and_then(seconds_of).unwrap_or(now);
    let wait = then.checked_sub(now).filter(|wait| *wait > 0)?;
    Some(Duration::from_secs(wait).min(longest))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` in seconds since 1970.
fn seconds_of(date: &str) -> Option<u64> {
    let mut words = date.trim().split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
        .iter()
        .position(|known| *known == name)? as i8
        + 1;
    let year: i16 = words.next()?.parse().ok()?;
    let mut time = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    if words.next() != Some("GMT") || !(1..=31).contains(&day) || !(1970..=9999).contains(&year) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // From the first of the month on: a 31st of February is some day of March, and a minute may have 61 seconds.
    let first = Date::new(year, month, 1).ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second();
    Some(u64::try_from(first).ok()? + (day - 1) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(300);

    #[test]
    fn dates_are_read() {
        assert_eq!(seconds_of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(seconds_of("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(seconds_of("Thu, 29 Feb 2024 23:59:59 GMT"), Some(1_709_251_199));
        // Those that are no dates, and are yet some moment.
        assert_eq!(seconds_of("Sat, 31 Feb 2024 00:00:00 GMT"), seconds_of("Sat, 02 Mar 2024 00:00:00 GMT"));
        assert_eq!(seconds_of("Sat, 31 Dec 2016 23:59:60 GMT"), seconds_of("Sun, 01 Jan 2017 00:00:00 GMT"));
        assert_eq!(seconds_of("Fri, 31 Dec 9999 23:59:60 GMT"), Some(253_402_300_800));
        assert_eq!(seconds_of("Fri, 31 Dec 1969 23:59:59 GMT"), None);
        assert_eq!(seconds_of("?, 6 Nov 1994 8:49:37 GMT, they say"), None);
        assert_eq!(seconds_of("?, 6 Nov 1994 8:49:37 GMT they say"), Some(784_111_777));
        for bad in ["", "now", "Sun, 06 Nov 1994", "Sun, 06 Nov 1994 08:49 GMT", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(seconds_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_wait_is_bounded_whatever_the_clocks_say() {
        let after = |value, date| retry_after(value, date, 784_111_777, LONGEST);
        assert_eq!(after("2", None), Some(Duration::from_secs(2)));
        assert_eq!(after("0.0000000000000005", None), None);
        assert_eq!(after("0.5", None), Some(Duration::from_millis(500)));
        assert_eq!(after("86400", None), Some(LONGEST));
        for nothing in ["-3", "0", "inf", "NaN", "soon", ""] {
            assert_eq!(after(nothing, None), None, "{nothing}");
        }
        assert_eq!(after("Sun, 06 Nov 1994 08:49:40 GMT", None), Some(Duration::from_secs(3)));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:00 GMT", None), None, "the past asks for nothing");
        assert_eq!(after("Sun, 06 Nov 2094 08:49:00 GMT", None), Some(LONGEST));
        let skewed = Some("Mon, 06 Nov 2000 08:49:00 GMT");
        assert_eq!(after("Mon, 06 Nov 2000 08:49:05 GMT", skewed), Some(Duration::from_secs(5)));
    }
}
