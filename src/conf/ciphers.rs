//! OpenSSL's cipher lists (its manual's ciphers(1)), as far as they say something of the suites that the TLS library has.
//!
//! As with OpenSSL a list is about TLS 1.2 alone, and a name that nobody knows matches nothing.

/// A suite of TLS 1.2. All of them exchange keys by ephemeral ECDH and need no MAC of their own.
struct Suite {
    number: u16,
    name: &'static str,
    is_ecdsa: bool,
    cipher: Cipher,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Cipher {
    Aes256,
    Chacha,
    Aes128,
}

const fn suite(number: u16, name: &'static str, is_ecdsa: bool, cipher: Cipher) -> Suite {
    Suite { number, name, is_ecdsa, cipher }
}

/// In the order in which OpenSSL prefers them.
const SUITES: [Suite; 6] = [
    suite(0xc02c, "ECDHE-ECDSA-AES256-GCM-SHA384", true, Cipher::Aes256),
    suite(0xc030, "ECDHE-RSA-AES256-GCM-SHA384", false, Cipher::Aes256),
    suite(0xcca9, "ECDHE-ECDSA-CHACHA20-POLY1305", true, Cipher::Chacha),
    suite(0xcca8, "ECDHE-RSA-CHACHA20-POLY1305", false, Cipher::Chacha),
    suite(0xc02b, "ECDHE-ECDSA-AES128-GCM-SHA256", true, Cipher::Aes128),
    suite(0xc02f, "ECDHE-RSA-AES128-GCM-SHA256", false, Cipher::Aes128),
];

/// OpenSSL's highest security level.
const MAX_LEVEL: u8 = 5;

impl Suite {
    fn is(&self, word: &str) -> bool {
        let aes = self.cipher != Cipher::Chacha;
        match word {
            "ALL" | "DEFAULT" | "HIGH" | "TLSv1.2" | "ECDHE" | "EECDH" | "ECDH" | "kECDHE" | "kEECDH" => true,
            "ECDSA" | "aECDSA" => self.is_ecdsa,
            // `RSA` is the exchange of keys by RSA, which TLS 1.2 is better without.
            "aRSA" => !self.is_ecdsa,
            "AES" | "AESGCM" | "FIPS" => aes,
            "AES256" => self.cipher == Cipher::Aes256,
            "AES128" => self.cipher == Cipher::Aes128,
            "CHACHA20" => !aes,
            name => name == self.name,
        }
    }
}

/// The suites that a list leaves, by their IANA numbers and in its order. Never none: that and what is no list is an error, which
/// says what the text is not.
pub fn suites(list: &str) -> Result<Vec<u16>, String> {
    let mut chosen: Vec<&Suite> = Vec::new();
    let mut banned: Vec<&Suite> = Vec::new();
    for rule in list.split([':', ',', ';', ' ']).filter(|rule| !rule.is_empty()) {
        if let Some(command) = rule.strip_prefix('@') {
            follow(command, &mut chosen)?;
            continue;
        }
        let (sign, words) = match rule.split_at_checked(1) {
            Some((sign @ ("!" | "-" | "+"), words)) => (sign, words),
            _ => ("", rule),
        };
        let is_word = |word: &str| {
            !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'='))
        };
        if !words.split('+').all(is_word) {
            return Err(format!("one of OpenSSL's cipher lists: {rule:?} is no cipher suite and no group of them"));
        }
        let meant = |suite: &&Suite| words.split('+').all(|word| suite.is(word));
        match sign {
            "" => {
                let new = SUITES.iter().filter(meant).filter(|new| !has(&banned, new) && !has(&chosen, new));
                let new: Vec<_> = new.collect();
                chosen.extend(new);
            }
            "+" => chosen.sort_by_key(|suite| meant(suite)),
            _ => {
                chosen.retain(|suite| !meant(suite));
                if sign == "!" {
                    banned.extend(SUITES.iter().filter(meant));
                }
            }
        }
    }
    match chosen.is_empty() {
        false => Ok(chosen.iter().map(|suite| suite.number).collect()),
        true => {
            let names: Vec<_> = SUITES.iter().map(|suite| suite.name).collect();
            Err(format!("a cipher list that leaves any suite of TLS 1.2: there are {}", names.join(", ")))
        }
    }
}

fn has(list: &[&Suite], one: &Suite) -> bool {
    list.iter().any(|suite| suite.number == one.number)
}

/// `@STRENGTH` orders by the length of keys; there is no level that the suites do not have.
fn follow(command: &str, chosen: &mut [&Suite]) -> Result<(), String> {
    let level = command.strip_prefix("SECLEVEL=").and_then(|level| level.parse::<u8>().ok());
    match (command, level) {
        ("STRENGTH", _) => chosen.sort_by_key(|suite| suite.cipher == Cipher::Aes128),
        (_, Some(0..=MAX_LEVEL)) => {}
        _ => {
            return Err(format!("one of OpenSSL's cipher lists: @{command} is neither @STRENGTH nor @SECLEVEL=0 to 5"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECDSA: [u16; 3] = [0xc02c, 0xcca9, 0xc02b];
    const RSA: [u16; 3] = [0xc030, 0xcca8, 0xc02f];
    const ALL: [u16; 6] = [0xc02c, 0xc030, 0xcca9, 0xcca8, 0xc02b, 0xc02f];

    #[test]
    fn lists_choose_and_order_suites() {
        for (list, expected) in [
            ("DEFAULT", &ALL[..]),
            ("HIGH:!aNULL:!MD5", &ALL),
            ("ALL:!aRSA", &ECDSA),
            ("ECDHE+aRSA", &RSA),
            ("ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-GCM-SHA256", &[0xc02f, 0xc02b]),
            ("DES-CBC3-SHA,AES128-SHA ECDHE-RSA-AES128-GCM-SHA256", &[0xc02f]),
            (
                "EECDH+CHACHA20:EECDH+AES128:RSA+AES128:EECDH+AES256:!MD5",
                &[0xcca9, 0xcca8, 0xc02b, 0xc02f, 0xc02c, 0xc030],
            ),
            ("AES128:CHACHA20:@STRENGTH", &[0xcca9, 0xcca8, 0xc02b, 0xc02f]),
            ("ALL:+CHACHA20:@SECLEVEL=2", &[0xc02c, 0xc030, 0xc02b, 0xc02f, 0xcca9, 0xcca8]),
            ("AES:-AES128:AES128+ECDSA", &[0xc02c, 0xc030, 0xc02b]),
            ("!AES128:AES:CHACHA20+aECDSA", &[0xc02c, 0xc030, 0xcca9]),
            ("AES256:AES256:AES", &[0xc02c, 0xc030, 0xc02b, 0xc02f]),
        ] {
            assert_eq!(suites(list).as_deref(), Ok(expected), "{list}");
        }
    }

    #[test]
    fn what_is_no_list_says_what_is_wrong() {
        for (list, why) in [
            ("", "leaves any suite of TLS 1.2: there are ECDHE-ECDSA-AES256-GCM-SHA384, ECDHE-RSA-"),
            ("AES128-SHA", "leaves any suite"),
            ("TLS_AES_128_GCM_SHA256", "leaves any suite"),
            ("HIGH:!ECDHE", "leaves any suite"),
            ("HIGH:!", "\"!\" is no cipher suite"),
            ("HIGH+", "\"HIGH+\" is no cipher suite"),
            ("HIGH:<x>", "\"<x>\" is no cipher suite"),
            ("é", "\"é\" is no cipher suite"),
            ("HIGH:@SECLEVEL=6", "@SECLEVEL=6 is neither"),
            ("HIGH:@ORDER", "@ORDER is neither"),
        ] {
            let error = suites(list).expect_err(list);
            assert!(error.contains(why), "{list}: {error}");
        }
    }
}
