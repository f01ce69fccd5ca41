//! The 8-bit float `e4m3fn`: four exponent bits, three of mantissa, no infinities.

/// Largest finite value.
pub const MAX: f32 = 448.0;

/// Value of every code; codes 0x7f and 0xff are NaN.
pub static DECODE: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = decode(code as u8);
        code += 1;
    }
    table
};

const fn decode(code: u8) -> f32 {
    let exponent = (code >> 3 & 15) as u32;
    let mantissa = (code & 7) as u32;
    let sign = (code as u32 & 0x80) << 24;
    if exponent == 15 && mantissa == 7 {
        return f32::NAN;
    }
    if exponent == 0 {
        // Subnormal: mantissa * 2^-9, exact in f32.
        let magnitude = mantissa as f32 / 512.0;
        return if sign == 0 { magnitude } else { -magnitude };
    }
    f32::from_bits(sign | (exponent + 127 - 7) << 23 | mantissa << 20)
}

/// The nearest code, ties to even; values beyond [`MAX`] saturate.
pub fn encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24 & 0x80) as u8;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs();
    if magnitude >= MAX {
        return sign | 0x7e;
    }
    if magnitude < 1.0 / 64.0 {
        // Below the smallest normal the codes are a plain count of 2^-9; 8 of them is the first normal's code.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    // Adding just under half of the last kept bit, plus that bit, rounds ties to even; a carry moves the exponent.
    let rounded = bits + (1 << 19) - 1 + (bits >> 20 & 1);
    let code = (rounded >> 20) - ((127 - 7) << 3);
    // 464 and above would round to the NaN code.
    sign | (code as u8).min(0x7e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives() {
        for code in 0..=255u8 {
            let value = DECODE[code as usize];
            let expected = if value.is_nan() { code & 0x80 | 0x7f } else { code };
            // The sign of a NaN is not kept by the table.
            assert_eq!(encode(value) | 0x80, expected | 0x80, "code {code:#x}");
            if !value.is_nan() {
                assert_eq!(encode(value), code);
            }
        }
    }

    #[test]
    fn encode_is_the_nearest_code() {
        let finite: Vec<u8> = (0..=0x7e).collect();
        let mut value = 0.0001f32;
        while value < 600.0 {
            let error = |code: &u8| (DECODE[*code as usize] - value).abs();
            let best = finite.iter().map(error).fold(f32::MAX, f32::min);
            assert_eq!(error(&encode(value)), best, "{value}");
            assert_eq!(encode(-value), encode(value) | 0x80);
            value *= 1.003;
        }
    }

    #[test]
    fn ties_go_to_even_codes() {
        for code in 0..0x7eu8 {
            let middle = (DECODE[code as usize] + DECODE[code as usize + 1]) / 2.0;
            assert_eq!(encode(middle) % 2, 0, "between {code:#x} and the next");
        }
    }
}
