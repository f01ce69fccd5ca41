//! Numbers for people.

/// Bytes with a decimal prefix, as `12.3 GB`.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count as f64, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// A count with a prefix, as `6.5 B` for billions.
pub(crate) fn count(count: u64) -> String {
    scaled(count as f64, &["", "K", "M", "B", "T"])
}

/// A rate with a decimal prefix, as `1.2 G` in front of a unit.
pub(crate) fn rate(value: f64) -> String {
    scaled(value, &["", "k", "M", "G", "T", "P"])
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 && value.fract() == 0.0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[unit]).trim_end().to_owned()
}

/// A whole number with thousands set apart, as `119 003 283 456`.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// A duration, as `420 ms`, `3.2 s` or `5 min 10 s`.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1e-2 => format!("{:.2} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.1} s"),
        s => format!("{} min {} s", s as u64 / 60, s as u64 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(237_900_000_000), "238 GB");
        assert_eq!(bytes(1_500), "1.50 kB");
        assert_eq!(count(999_999), "1.00 M");
        assert_eq!(count(0), "0");
        assert_eq!(rate(0.5), "0.50");
        assert_eq!(grouped(119_003_283_456), "119 003 283 456");
        assert_eq!(grouped(12), "12");
        assert_eq!((seconds(0.0421).as_str(), seconds(310.9).as_str()), ("42 ms", "5 min 10 s"));
    }
}
