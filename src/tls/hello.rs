//! The first message of a client (RFC 8446, 4.1.2; RFC 5246, 7.4.1.2), read for scripts that decide about the handshake.
//!
//! What is no ClientHello is no error here: the TLS library reads the same bytes, and answers them as it should.

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{error::Result, exchange::ClientHello};

/// As much as the TLS library takes for one message.
const MAX_HELLO: usize = 0xffff;
const RECORD_HEADER: usize = 5;
const MESSAGE_HEADER: usize = 4;
const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const PRE_SHARED_KEY: u16 = 41;
const SERVER_NAME: u16 = 0;
const SUPPORTED_VERSIONS: u16 = 43;
const SUPPORTED_GROUPS: u16 = 10;
const SESSION_TICKET: u16 = 35;

/// As many bytes as a ClientHello may take with its records: tiny records could make ten times as many of it.
const MAX_BYTES: usize = MAX_HELLO + 4096;

/// What was read off a connection so far.
pub struct Opening {
    /// Everything, for whoever reads on.
    pub bytes: Vec<u8>,
    /// The body of the ClientHello; `None` when it is something else, or too long.
    pub hello: Option<Vec<u8>>,
}

/// Reads until the client's first message is whole. The caller limits its time.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Opening> {
    let mut bytes = Vec::with_capacity(1024);
    let mut joined = Joined::default();
    loop {
        match joined.go_on(&bytes) {
            Progress::Whole => {
                let hello = joined.message.split_off(MESSAGE_HEADER);
                return Ok(Opening { bytes, hello: Some(hello) });
            }
            Progress::Other => return Ok(Opening { bytes, hello: None }),
            Progress::Partial => {}
        }
        if bytes.len() >= MAX_BYTES || stream.read_buf(&mut bytes).await? == 0 {
            return Ok(Opening { bytes, hello: None });
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Whole,
    Partial,
    Other,
}

/// A message that several records may carry, as far as it is there: each byte is looked at once, however many reads it takes.
#[derive(Default)]
struct Joined {
    /// How much of what was read is in it.
    at: usize,
    message: Vec<u8>,
}

impl Joined {
    /// Takes what `bytes`, everything read so far, holds of whole records.
    fn go_on(&mut self, bytes: &[u8]) -> Progress {
        loop {
            if let [kind, a, b, c, body @ ..] = &self.message[..] {
                let len = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
                if *kind != CLIENT_HELLO || len > MAX_HELLO {
                    return Progress::Other;
                }
                if body.len() >= len {
                    self.message.truncate(MESSAGE_HEADER + len);
                    return Progress::Whole;
                }
            }
            let record = &bytes[self.at..];
            match record {
                [kind, ..] if *kind != HANDSHAKE_RECORD => return Progress::Other,
                [_, _, _, high, low, ..] => {
                    let len = usize::from(u16::from_be_bytes([*high, *low]));
                    if len == 0 {
                        return Progress::Other;
                    }
                    let Some(fragment) = record.get(RECORD_HEADER..RECORD_HEADER + len) else {
                        return Progress::Partial;
                    };
                    self.message.extend_from_slice(fragment);
                    self.at += RECORD_HEADER + len;
                }
                _ => return Progress::Partial,
            }
        }
    }
}

/// A ClientHello's fields, borrowed from its bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hello<'a> {
    pub version: u16,
    pub random: &'a [u8],
    pub session_id: &'a [u8],
    /// Two bytes each.
    ciphers: &'a [u8],
    extensions: &'a [u8],
}

/// Bytes that are taken off from the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<usize> {
        self.take(1).map(|b| usize::from(b[0]))
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    /// A vector with its length in two bytes before it.
    fn vector(&mut self) -> Option<&'a [u8]> {
        let len = self.u16()?;
        self.take(len.into())
    }
}

/// Pairs of bytes as numbers.
fn numbers(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

impl<'a> Hello<'a> {
    /// `None`: the message is not whole, or its lengths do not agree.
    pub fn parse(bytes: &'a [u8]) -> Option<Hello<'a>> {
        let mut input = Input(bytes);
        let version = input.u16()?;
        let random = input.take(32)?;
        let id_len = input.u8()?;
        let session_id = input.take(id_len)?;
        let ciphers = input.vector()?;
        let compressions = input.u8()?;
        input.take(compressions)?;
        // TLS 1.2 may end here.
        let extensions = if input.0.is_empty() { &[] } else { input.vector()? };
        let hello = Hello { version, random, session_id, ciphers, extensions };
        let whole = hello.extensions().map(|(_, data)| data.len() + 4).sum::<usize>() == extensions.len();
        (whole && input.0.is_empty()).then_some(hello)
    }

    /// What is kept for as long as the connection lives.
    pub fn keep(&self) -> ClientHello {
        let curves = self.extension(SUPPORTED_GROUPS).and_then(|data| Input(data).vector()).unwrap_or_default();
        ClientHello {
            random: self.random.try_into().unwrap_or_default(),
            session_id: self.session_id.into(),
            ciphers: self.ciphers().collect(),
            curves: numbers(curves).collect(),
        }
    }

    /// Cipher suites by their numbers, in the client's order.
    pub fn ciphers(&self) -> impl Iterator<Item = u16> + use<'a> {
        numbers(self.ciphers)
    }

    /// Extensions by their numbers, in the client's order.
    pub fn extensions(&self) -> impl Iterator<Item = (u16, &'a [u8])> + use<'a> {
        let mut input = Input(self.extensions);
        std::iter::from_fn(move || Some((input.u16()?, input.vector()?)))
    }

    pub fn extension(&self, number: u16) -> Option<&'a [u8]> {
        self.extensions().find(|(n, _)| *n == number).map(|(_, data)| data)
    }

    /// The host that the client asks for (RFC 6066, 3).
    pub fn server_name(&self) -> Option<&'a str> {
        let mut list = Input(Input(self.extension(SERVER_NAME)?).vector()?);
        loop {
            let (kind, name) = (list.u8()?, list.vector()?);
            if kind == 0 {
                return std::str::from_utf8(name).ok();
            }
        }
    }

    /// The versions that the client lists (RFC 8446, 4.2.1), in its order; `None` when it lists none.
    pub fn supported_versions(&self) -> Option<impl Iterator<Item = u16> + use<'a>> {
        let mut input = Input(self.extension(SUPPORTED_VERSIONS)?);
        let len = input.u8()?;
        Some(numbers(input.take(len)?))
    }

    /// Whether the client can speak this version.
    pub fn offers(&self, version: u16) -> bool {
        match self.supported_versions() {
            Some(mut versions) => versions.any(|v| v == version),
            None => self.version >= version && version <= 0x303,
        }
    }

    /// Whether the client brings a ticket of TLS 1.2 (RFC 5077).
    pub fn brings_ticket(&self) -> bool {
        self.extension(SESSION_TICKET).is_some_and(|ticket| !ticket.is_empty())
    }

    /// Whether the client brings something of an earlier session. A session ID says nothing in TLS 1.3: clients send one so that
    /// the first message looks as it used to (RFC 8446, D.4).
    pub fn resumes(&self, tls13: bool) -> bool {
        match tls13 {
            true => self.extension(PRE_SHARED_KEY).is_some(),
            false => self.brings_ticket() || !self.session_id.is_empty(),
        }
    }

    /// What the session is called that the client wants to resume: of TLS 1.3 the first identity of its keys.
    pub fn resumed_session(&self, tls13: bool) -> Option<&'a [u8]> {
        match tls13 {
            true => Input(Input(self.extension(PRE_SHARED_KEY)?).vector()?).vector(),
            false => Some(self.session_id).filter(|id| !id.is_empty()),
        }
    }
}

/// Values that clients mix in so that servers learn to pass over what they do not know (RFC 8701).
pub fn is_grease(number: u16) -> bool {
    number & 0x0f0f == 0x0a0a && number >> 8 == number & 0xff
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConnection, RootCertStore, crypto::ring};

    use super::*;

    /// What rustls sends to `name`.
    fn first_flight(name: &'static str) -> Vec<u8> {
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut client = ClientConnection::new(Arc::new(config), name.try_into().expect("a name")).expect("a client");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("written");
        bytes
    }

    fn read_all(bytes: &[u8]) -> Opening {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(read(&mut &bytes[..])).expect("read")
    }

    #[test]
    fn a_hello_is_read_whole_and_nothing_of_it_is_lost() {
        let bytes = first_flight("a.test");
        let opening = read_all(&bytes);
        assert_eq!(opening.bytes, bytes);
        let hello = opening.hello.expect("a hello");
        let hello = Hello::parse(&hello).expect("valid");
        assert_eq!((hello.version, hello.random.len(), hello.server_name()), (0x303, 32, Some("a.test")));
        assert!(hello.offers(0x304) && hello.offers(0x303) && !hello.offers(0x302));
        assert!(hello.ciphers().any(|c| c == 0x1301));
        assert!(hello.extension(SUPPORTED_VERSIONS).is_some() && hello.extension(9999).is_none());
        assert_eq!(hello.resumed_session(true), None);
    }

    #[test]
    fn a_message_may_come_in_many_records() {
        let bytes = first_flight("a.test");
        let whole = read_all(&bytes).hello.expect("a hello");
        let mut split = Vec::new();
        for part in bytes[RECORD_HEADER..].chunks(7) {
            split.extend([22, 3, 1, 0, part.len() as u8]);
            split.extend(part);
        }
        assert_eq!(read_all(&split).hello, Some(whole));
    }

    #[test]
    fn what_is_no_hello_is_given_back_as_it_came() {
        let http = b"GET / HTTP/1.1\r\n\r\n";
        let too_long = [&[22, 3, 1, 0, 4, 1][..], &[1, 0, 0]].concat();
        let empty_record = [22, 3, 1, 0, 0];
        for bytes in [&http[..], &too_long, &empty_record, &first_flight("a.test")[..40], b""] {
            let opening = read_all(bytes);
            assert!(opening.hello.is_none(), "{bytes:?}");
            assert_eq!(opening.bytes, bytes);
        }
    }

    /// A message of so many bytes in records of at most so many.
    fn in_records(len: usize, record: usize) -> Vec<u8> {
        let message = [&[1, (len >> 16) as u8, (len >> 8) as u8, len as u8][..], &vec![0; len]].concat();
        let record_of = |part: &[u8]| [&[22, 3, 1, (part.len() >> 8) as u8, part.len() as u8][..], part].concat();
        message.chunks(record).map(record_of).collect::<Vec<_>>().concat()
    }

    #[test]
    fn the_longest_hello_is_read_and_a_longer_one_is_not() {
        assert_eq!(read_all(&in_records(MAX_HELLO, 16_384)).hello.map(|h| h.len()), Some(MAX_HELLO));
        assert!(read_all(&in_records(MAX_HELLO + 1, 16_384)).hello.is_none());
    }

    #[test]
    fn tiny_records_are_read_up_to_a_bound_and_no_byte_twice() {
        let bytes = in_records(10_000, 1);
        assert_eq!(read_all(&bytes).hello.map(|h| h.len()), Some(10_000));
        let endless = in_records(MAX_HELLO, 1);
        let opening = read_all(&endless);
        assert!(opening.hello.is_none());
        assert!(opening.bytes.len() < MAX_BYTES * 2, "{}", opening.bytes.len());
        // What is there is taken with the first look, and a second one has nothing left to take.
        let mut joined = Joined::default();
        for end in 0..bytes.len() {
            let before = joined.at;
            assert_eq!(joined.go_on(&bytes[..end]), Progress::Partial);
            assert!(joined.at - before <= RECORD_HEADER + 1 && end - joined.at < RECORD_HEADER + 1, "at {end}");
        }
        assert_eq!(joined.go_on(&bytes), Progress::Whole);
    }

    #[test]
    fn damaged_hellos_are_refused_or_read_but_never_panic() {
        let hello = read_all(&first_flight("a.test")).hello.expect("a hello");
        // One cut leaves a message without extensions, which TLS 1.2 allows.
        let whole = (0..hello.len()).filter_map(|end| Hello::parse(&hello[..end])).collect::<Vec<_>>();
        assert!(whole.len() == 1 && whole[0].extensions.is_empty(), "{whole:?}");
        for at in 0..hello.len() {
            for bits in [0x01, 0x80, 0xff] {
                let mut damaged = hello.clone();
                damaged[at] ^= bits;
                if let Some(hello) = Hello::parse(&damaged) {
                    let _ = (
                        hello.server_name(),
                        hello.resumes(true),
                        hello.resumes(false),
                        hello.offers(0x304),
                        hello.resumed_session(true),
                    );
                    let _ = hello.ciphers().count() + hello.extensions().count();
                }
            }
        }
    }

    #[test]
    fn grease_is_known() {
        assert!(is_grease(0x0a0a) && is_grease(0xfafa) && !is_grease(0x0a1a) && !is_grease(0x1301));
    }
}
