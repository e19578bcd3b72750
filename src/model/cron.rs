//! When a schedule fires: five fields as in crontab(5), in UTC, or six with seconds in front.
//!
//! Pure: times are arguments, in seconds since the epoch.

use chrono::{DateTime, Datelike, Days, NaiveDate, Timelike};

/// A schedule as sets of bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cron {
    seconds: u64,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    /// Sunday is 0.
    weekdays: u64,
    /// Both day fields are restricted: a day that either names is meant.
    either_day: bool,
}

/// A field's name, its least and its greatest number, and names for numbers from the least on.
struct Field {
    name: &'static str,
    min: u32,
    max: u32,
    names: &'static [&'static str],
}

const fn field(name: &'static str, min: u32, max: u32, names: &'static [&'static str]) -> Field {
    Field { name, min, max, names }
}

const FIELDS: [Field; 6] = [
    field("second", 0, 59, &[]),
    field("minute", 0, 59, &[]),
    field("hour", 0, 23, &[]),
    field("day of month", 1, 31, &[]),
    field("month", 1, 12, &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]),
    // 7 is Sunday, too.
    field("day of week", 0, 7, &["sun", "mon", "tue", "wed", "thu", "fri", "sat"]),
];

/// Between two 29ths of February around a year like 2100.
const LONGEST_GAP_DAYS: u64 = 8 * 366;

impl Cron {
    /// The error names the field and says what it may be.
    pub fn parse(text: &str) -> Result<Cron, String> {
        let parts: Vec<&str> = text.split_whitespace().collect();
        let seconds = match parts.len() {
            5 => 1,
            6 => bits(parts[0], &FIELDS[0])?,
            n => return Err(format!("five fields are expected, or six with seconds in front, got {n}")),
        };
        let rest = &parts[parts.len() - 5..];
        let of = |n: usize| bits(rest[n], &FIELDS[n + 1]);
        let (minutes, hours, days, months, weekdays) = (of(0)?, of(1)?, of(2)?, of(3)?, of(4)?);
        let weekdays = (weekdays | weekdays >> 7) & 0x7f;
        let either_day = !rest[2].starts_with('*') && !rest[4].starts_with('*');
        let cron = Cron { seconds, minutes, hours, days, months, weekdays, either_day };
        match cron.next(0) {
            Some(_) => Ok(cron),
            None => Err("day of month and month: no such day ever comes".into()),
        }
    }

    /// The first time after `after`; `None`: beyond what a calendar holds.
    pub fn next(&self, after: i64) -> Option<i64> {
        let first = DateTime::from_timestamp(after.checked_add(1)?, 0)?;
        let mut date = first.date_naive();
        let mut from = first.num_seconds_from_midnight();
        for _ in 0..=LONGEST_GAP_DAYS {
            if self.has_day(date)
                && let Some(second) = self.time_from(from)
            {
                return Some(date.and_hms_opt(0, 0, 0)?.and_utc().timestamp() + i64::from(second));
            }
            date = date.checked_add_days(Days::new(1))?;
            from = 0;
        }
        None
    }

    fn has_day(&self, date: NaiveDate) -> bool {
        let day = has(self.days, date.day());
        let weekday = has(self.weekdays, date.weekday().num_days_from_sunday());
        has(self.months, date.month()) && if self.either_day { day || weekday } else { day && weekday }
    }

    /// The first second of a day that is not before `from`.
    fn time_from(&self, from: u32) -> Option<u32> {
        let minutes = (from / 60..24 * 60).filter(|m| has(self.hours, m / 60) && has(self.minutes, m % 60));
        minutes.into_iter().find_map(|minute| {
            let first = from.saturating_sub(minute * 60);
            let second = (first..60).find(|s| has(self.seconds, *s))?;
            Some(minute * 60 + second)
        })
    }
}

fn has(bits: u64, n: u32) -> bool {
    bits & (1 << n) != 0
}

/// `*`, `5`, `1-5`, `*/15`, `1-30/2`, `mon-fri`, and lists of them.
fn bits(text: &str, field: &Field) -> Result<u64, String> {
    let refuse = |why: &str| Err(format!("{} \"{text}\": {why}", field.name));
    let mut bits = 0;
    for part in text.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, step.parse().ok().filter(|step| *step > 0)),
            None => (part, Some(1_u32)),
        };
        let Some(step) = step else { return refuse("the step is no number above 0") };
        let (from, to) = match range.split_once('-') {
            Some((from, to)) => (number(from, field), number(to, field)),
            None if range == "*" => (Some(field.min), Some(field.max)),
            // With a step a single number is a start.
            None if part.contains('/') => (number(range, field), Some(field.max)),
            None => (number(range, field), number(range, field)),
        };
        let (Some(from), Some(to)) = (from, to) else {
            return refuse(&format!("numbers from {} to {} are expected", field.min, field.max));
        };
        if from > to {
            return refuse("the range ends before it begins");
        }
        (from..=to).step_by(step as usize).for_each(|n| bits |= 1 << n);
    }
    Ok(bits)
}

fn number(text: &str, field: &Field) -> Option<u32> {
    let named = || field.names.iter().position(|name| name.eq_ignore_ascii_case(text)).map(|at| at as u32 + field.min);
    let written = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    written.or_else(named).filter(|n| (field.min..=field.max).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> i64 {
        DateTime::parse_from_rfc3339(text).expect("a time").timestamp()
    }

    fn after(cron: &str, from: &str) -> String {
        let next = Cron::parse(cron).expect(cron).next(at(from)).expect("comes");
        DateTime::from_timestamp(next, 0).expect("a time").format("%FT%TZ").to_string()
    }

    #[test]
    fn fires_when_it_says() {
        for (cron, from, next) in [
            ("*/5 * * * *", "2026-01-01T00:00:00Z", "2026-01-01T00:05:00Z"),
            ("*/5 * * * *", "2026-01-01T00:04:59Z", "2026-01-01T00:05:00Z"),
            ("0 3 * * *", "2026-12-31T03:00:00Z", "2027-01-01T03:00:00Z"),
            ("30 4 1,15 * *", "2026-02-01T04:30:00Z", "2026-02-15T04:30:00Z"),
            ("0 0 29 2 *", "2096-03-01T00:00:00Z", "2104-02-29T00:00:00Z"),
            // A Thursday; with both day fields either is meant.
            ("0 0 13 * fri", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
            ("0 0 13 * *", "2026-01-01T00:00:00Z", "2026-01-13T00:00:00Z"),
            ("0 9 * * MON-fri", "2026-01-02T09:00:00Z", "2026-01-05T09:00:00Z"),
            ("0 9 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T09:00:00Z"),
            ("5/20 1 * jan *", "2026-01-01T01:05:00Z", "2026-01-01T01:25:00Z"),
            ("*/10 * * * * *", "2026-01-01T00:00:55Z", "2026-01-01T00:01:00Z"),
            ("59 59 23 31 12 *", "2026-01-01T00:00:00Z", "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(after(cron, from), next, "{cron} after {from}");
        }
    }

    #[test]
    fn a_refusal_names_the_field() {
        for (cron, text) in [
            ("60 * * * *", "minute \"60\": numbers from 0 to 59 are expected"),
            ("* 24 * * *", "hour \"24\": numbers from 0 to 23 are expected"),
            ("* * 0 * *", "day of month \"0\": numbers from 1 to 31 are expected"),
            ("* * * 13 *", "month \"13\": numbers from 1 to 12 are expected"),
            ("* * * * 8", "day of week \"8\": numbers from 0 to 7 are expected"),
            ("* * * foo *", "month \"foo\": numbers from 1 to 12 are expected"),
            ("60 * * * * *", "second \"60\": numbers from 0 to 59 are expected"),
            ("*/0 * * * *", "minute \"*/0\": the step is no number above 0"),
            ("5-1 * * * *", "minute \"5-1\": the range ends before it begins"),
            ("+1 * * * *", "minute \"+1\": numbers from 0 to 59 are expected"),
            (", * * * *", "minute \",\": numbers from 0 to 59 are expected"),
            ("* * * *", "five fields are expected, or six with seconds in front, got 4"),
            ("0 0 30 2 *", "day of month and month: no such day ever comes"),
        ] {
            assert_eq!(Cron::parse(cron), Err(text.into()), "{cron}");
        }
    }

    #[test]
    fn the_end_of_the_calendar_is_no_panic() {
        let cron = Cron::parse("* * * * *").expect("valid");
        for after in [i64::MAX, i64::MAX - 1, 8_210_266_876_799] {
            assert_eq!(cron.next(after), None);
        }
    }
}
