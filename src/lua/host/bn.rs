//! Whole numbers of any size: what `resty.openssl.bn` stands on.

use std::rc::Rc;

use num_bigint::{BigInt, Sign};
use num_integer::Integer;

use super::Answer;
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        ngx::object,
    },
};

/// Bits of a number: above what keys have; a power with a modulus of this size takes half a second.
const MAX_BITS: u64 = 16384;
/// Digits of a number's text in the longest base.
const MAX_TEXT: usize = MAX_BITS as usize;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.bn.read", any, "read(text, 2 (bytes), 10 or 16) -> number | nil, err", read)?;
    api.func("native.bn.text", any, "text(number, 2 (bytes), 10 or 16) -> text", text)?;
    api.func("native.bn.compare", any, "compare(a, b) -> -1, 0 or 1", |s| {
        let (a, b) = (get(s, 1)?, get(s, 2)?);
        Ok(s.push_number(f64::from(a.cmp(&b) as i8)))
    })?;
    api.func("native.bn.compute", any, "compute(operation, a, b, modulus?) -> number | nil, err", compute)
}

fn get(s: &Stack, i: i32) -> std::result::Result<Rc<BigInt>, Raise> {
    object::get::<BigInt>(s, i)
}

fn read(s: &Stack) -> Answer {
    let (text, base) = (s.arg_bytes(1)?, s.arg_int(2)?);
    if text.len() > MAX_TEXT {
        return s.fail("the number is too large");
    }
    let number = match base {
        2 => Some(BigInt::from_bytes_be(Sign::Plus, text)),
        10 | 16 => BigInt::parse_bytes(text, base as u32),
        _ => return s.fail("unsupported base"),
    };
    answer(s, number.ok_or("not a number"))
}

fn answer(s: &Stack, number: std::result::Result<BigInt, &'static str>) -> Answer {
    match number {
        Ok(number) if number.bits() > MAX_BITS => s.fail("the number is too large"),
        Ok(number) => Ok(object::push(s, Rc::new(number))),
        Err(why) => s.fail(why),
    }
}

fn text(s: &Stack) -> Answer {
    let number = get(s, 1)?;
    Ok(match s.arg_int(2)? {
        2 if number.sign() == Sign::NoSign => s.push_bytes(""),
        2 => s.push_bytes(number.magnitude().to_bytes_be()),
        16 => {
            let digits = number.magnitude().to_str_radix(16).to_uppercase();
            // Whole bytes, as OpenSSL writes them.
            let zero = if digits.len() % 2 == 1 && digits != "0" { "0" } else { "" };
            s.push_bytes(format!("{}{zero}{digits}", if number.sign() == Sign::Minus { "-" } else { "" }))
        }
        _ => s.push_bytes(number.to_string()),
    })
}

fn compute(s: &Stack) -> Answer {
    let (a, b) = (get(s, 2)?, get(s, 3)?);
    let modulus = if s.is_nil(4) { None } else { Some(get(s, 4)?) };
    let zero = BigInt::ZERO;
    if modulus.as_ref().is_some_and(|m| **m == zero) {
        return s.fail("division by zero");
    }
    let small = |n: &BigInt| u64::try_from(n.clone()).ok().filter(|n| *n <= MAX_BITS).ok_or("the number is too large");
    let made = match s.arg_bytes(1)? {
        b"add" => Ok(&*a + &*b),
        b"sub" => Ok(&*a - &*b),
        b"mul" => Ok(&*a * &*b),
        b"div" | b"mod" if *b == zero => Err("division by zero"),
        b"div" => Ok(&*a / &*b),
        b"mod" => Ok(&*a % &*b),
        b"gcd" => Ok(a.gcd(&b)),
        b"lshift" => small(&b).map(|n| &*a << n),
        b"rshift" => small(&b).map(|n| &*a >> n),
        b"exp" => match &modulus {
            Some(_) if b.sign() == Sign::Minus => Err("a negative exponent"),
            Some(modulus) => return answer(s, Ok(a.modpow(&b, modulus))),
            // The result's bits are known before it is made.
            None => match small(&b) {
                Ok(n) if a.bits().saturating_mul(n) <= MAX_BITS => Ok(a.pow(n as u32)),
                _ => Err("the number is too large"),
            },
        },
        b"inverse" => {
            let Some(modulus) = &modulus else { return s.fail("a modulus is needed") };
            a.modinv(modulus).ok_or("there is no inverse")
        }
        _ => Err("unsupported operation"),
    };
    answer(s, made.map(|n| modulus.map_or(n.clone(), |m| n.mod_floor(&m))))
}
