//! HTTP/1 framing: where a head ends, how long a body is, what a chunk is. Shared by the server's codec and the
//! upstream's.
//!
//! Pure: bytes in, positions out; no socket and no clock. Strict (RFC 9112): what two readers could understand in
//! two ways is refused, never repaired, since a repaired message is how requests are smuggled.

use super::Version;

/// Why a message is refused: the status it deserves when it is a request, and a text for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    pub why: &'static str,
}

impl Refusal {
    pub const fn bad(why: &'static str) -> Self {
        Refusal { status: 400, why }
    }

    pub const fn with(status: u16, why: &'static str) -> Self {
        Refusal { status, why }
    }
}

/// Where a message's body ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    #[default]
    None,
    Length(u64),
    Chunked,
    /// With the connection (responses only).
    UntilClose,
}

/// What `Content-Length` and `Transfer-Encoding` of one head say: feed it each field, then ask once.
#[derive(Debug, Default)]
pub struct BodyFields {
    length: Option<u64>,
    chunked: bool,
}

impl BodyFields {
    pub fn content_length(&mut self, value: &[u8]) -> Result<(), Refusal> {
        // Equal ones are refused too, as nginx does: there is no honest reason to send two.
        if self.length.is_some() {
            return Err(Refusal::bad("several Content-Length"));
        }
        self.length = Some(parse_decimal(value).ok_or(Refusal::bad("invalid Content-Length"))?);
        Ok(())
    }

    pub fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Refusal> {
        if self.chunked {
            return Err(Refusal::bad("several Transfer-Encoding"));
        }
        if !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Refusal::with(501, "unknown Transfer-Encoding"));
        }
        self.chunked = true;
        Ok(())
    }

    pub fn of_request(&self, version: Version) -> Result<Framing, Refusal> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err(Refusal::bad("Content-Length and Transfer-Encoding")),
            (true, None) if version == Version::Http10 => Err(Refusal::bad("Transfer-Encoding in HTTP/1.0")),
            (true, None) => Ok(Framing::Chunked),
            (false, Some(0)) | (false, None) => Ok(Framing::None),
            (false, Some(n)) => Ok(Framing::Length(n)),
        }
    }

    /// `to_head`: the response answers a HEAD request.
    pub fn of_response(&self, status: u16, to_head: bool) -> Result<Framing, Refusal> {
        if self.chunked && self.length.is_some() {
            return Err(Refusal::bad("Content-Length and Transfer-Encoding"));
        }
        if to_head || matches!(status, 100..=199 | 204 | 304) {
            return Ok(Framing::None);
        }
        Ok(match (self.chunked, self.length) {
            (true, _) => Framing::Chunked,
            (false, Some(n)) => Framing::Length(n),
            (false, None) => Framing::UntilClose,
        })
    }

    /// `Content-Length`, also when no body follows (HEAD, 304).
    pub fn length(&self) -> Option<u64> {
        self.length
    }
}

/// Digits only: no sign, no space, no list, no overflow.
pub fn parse_decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |n, b| {
        let digit = b.is_ascii_digit().then(|| u64::from(b - b'0'))?;
        n.checked_mul(10)?.checked_add(digit)
    })
}

/// A character of a token (RFC 9110, 5.6.2): methods, field names.
pub fn is_token(b: u8) -> bool {
    TOKEN[b as usize]
}

static TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0usize;
    while b < 256 {
        table[b] = (b as u8).is_ascii_alphanumeric()
            || matches!(
                b as u8,
                b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
            );
        b += 1;
    }
    table
};

/// Looks for the empty line that ends a head, over input that grows. Every line must end in CRLF: a bare LF is
/// refused, since a head that one reader ends there another continues.
#[derive(Debug, Default)]
pub struct HeadScan {
    /// All before it was looked at.
    at: usize,
    /// Where the line that is being read starts.
    line: usize,
    first_done: bool,
}

/// Bounds of a head, as `large_client_header_buffers` sets them in nginx.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// The longest line: past it 414 for the request line, 400 for a field.
    pub line: usize,
    /// The whole head.
    pub total: usize,
}

impl HeadScan {
    /// Nothing was looked at yet.
    pub fn is_new(&self) -> bool {
        self.at == 0
    }

    /// The head's length, the empty line included, once all of it stands in `input`. `input` is what the last call
    /// got, and more.
    pub fn next(&mut self, input: &[u8], limits: HeadLimits) -> Result<Option<usize>, Refusal> {
        while let Some(found) = memchr::memchr(b'\n', &input[self.at..]) {
            let lf = self.at + found;
            if lf == self.line || input[lf - 1] != b'\r' {
                return Err(BARE_LF);
            }
            let length = lf + 1 - self.line;
            self.check(length, limits)?;
            if lf + 1 > limits.total {
                return Err(TOO_LARGE);
            }
            self.at = lf + 1;
            if length == 2 && self.first_done {
                return Ok(Some(lf + 1));
            }
            self.line = lf + 1;
            self.first_done = true;
        }
        self.at = input.len();
        self.check(input.len() - self.line, limits)?;
        if input.len() >= limits.total { Err(TOO_LARGE) } else { Ok(None) }
    }

    fn check(&self, line: usize, limits: HeadLimits) -> Result<(), Refusal> {
        match line > limits.line {
            false => Ok(()),
            true if self.first_done => Err(TOO_LARGE),
            true => Err(Refusal::with(414, "request line too long")),
        }
    }
}

/// Whether every line of a whole head ends in CRLF, for a head that a parser read without `HeadScan`: a parser may take a bare
/// LF for the end of a line. `first`: the first field's name, `values`: all values, where they stand in `head`.
pub fn ends_in_crlf<'a>(head: &[u8], first: Option<&[u8]>, mut values: impl Iterator<Item = &'a [u8]>) -> bool {
    let offset = |part: &[u8]| (part.as_ptr() as usize).wrapping_sub(head.as_ptr() as usize);
    let crlf_at = |at: usize| head.get(at..).is_some_and(|rest| rest.starts_with(b"\r\n"));
    let first_line = first.map_or(head.len().wrapping_sub(4), |name| offset(name).wrapping_sub(2));
    let seen = crlf_at(first_line)
        && crlf_at(head.len().wrapping_sub(2))
        && values.all(|value| crlf_at(offset(value).wrapping_add(value.len())));
    // Blanks at the end of a line, or a value that is empty: look at every byte.
    seen || !(head.starts_with(b"\n") || head.windows(2).any(|pair| pair[1] == b'\n' && pair[0] != b'\r'))
}

/// What is said of a bare LF.
pub const BARE_LF: Refusal = Refusal::bad("line feed without carriage return");

const TOO_LARGE: Refusal = Refusal::bad("header too large");

/// Decodes a chunked body, piece by piece as it comes.
#[derive(Debug)]
pub struct ChunkDecoder {
    state: State,
    /// Of the chunk.
    left: u64,
    /// Bytes of the size line or of the trailer section so far.
    overhead: usize,
    padding: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first digit.
    Start,
    Size,
    /// Spaces after the size, which some servers write.
    Padding,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Done,
}

/// What the decoder found at the start of its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunked {
    /// `input[from..to]` is body; everything up to `to` is used up.
    Data { from: usize, to: usize },
    /// All of the input is used up and the body goes on.
    More,
    /// The body ended; the first `used` bytes of the input belong to it.
    Done { used: usize },
}

/// A size line with its extensions, which nobody uses: past it the sender only wastes our time.
const SIZE_LINE_MAX: usize = 1024;
/// A trailer section: as much as one header line may have.
const TRAILERS_MAX: usize = 8 * 1024;

impl ChunkDecoder {
    /// For a request: as strict as the grammar.
    pub fn new() -> Self {
        ChunkDecoder { state: State::Start, left: 0, overhead: 0, padding: false }
    }

    /// For a response: spaces after the size are let through, since old servers pad it.
    pub fn of_response() -> Self {
        ChunkDecoder { padding: true, ..Self::new() }
    }

    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Looks at `input`, which starts where the last call's use ended.
    pub fn next(&mut self, input: &[u8]) -> Result<Chunked, Refusal> {
        let mut at = 0;
        while self.state != State::Done {
            if self.state == State::Data && self.left > 0 {
                let len = self.left.min((input.len() - at) as u64);
                if len == 0 {
                    return Ok(Chunked::More);
                }
                self.left -= len;
                return Ok(Chunked::Data { from: at, to: at + len as usize });
            }
            if self.state == State::Data {
                self.state = State::DataCr;
            }
            let Some(&b) = input.get(at) else { return Ok(Chunked::More) };
            at += 1;
            self.state = self.step(b)?;
        }
        Ok(Chunked::Done { used: at })
    }

    /// The state after a byte that is not data.
    fn step(&mut self, b: u8) -> Result<State, Refusal> {
        use State::*;
        self.count()?;
        match (self.state, b) {
            (Start | Size, b) if b.is_ascii_hexdigit() => self.digit(b),
            (Size, b';') | (Padding, b';') => Ok(Extension),
            (Size | Padding, b' ' | b'\t') if self.padding => Ok(Padding),
            (Size | Padding | Extension, b'\r') => Ok(SizeLf),
            (Extension, b) if is_text(b) => Ok(Extension),
            (SizeLf, b'\n') => {
                self.overhead = 0;
                Ok(if self.left == 0 { TrailerStart } else { Data })
            }
            (DataCr, b'\r') => Ok(DataLf),
            (DataLf, b'\n') => {
                self.overhead = 0;
                Ok(Start)
            }
            (TrailerStart, b'\r') => Ok(EndLf),
            (TrailerStart | TrailerName, b) if is_token(b) => Ok(TrailerName),
            (TrailerName, b':') => Ok(TrailerValue),
            (TrailerValue, b'\r') => Ok(TrailerLf),
            (TrailerValue, b) if is_text(b) => Ok(TrailerValue),
            (TrailerLf, b'\n') => Ok(TrailerStart),
            (EndLf, b'\n') => Ok(Done),
            (TrailerStart | TrailerName | TrailerValue | TrailerLf | EndLf, _) => Err(Refusal::bad("bad trailer")),
            (DataCr | DataLf, _) => Err(Refusal::bad("chunk longer than its size")),
            _ => Err(Refusal::bad("bad chunk size")),
        }
    }

    fn digit(&mut self, b: u8) -> Result<State, Refusal> {
        let digit = (b as char).to_digit(16).unwrap_or(0);
        // A size that needs the top bits is refused, so that no later sum of sizes overflows.
        if self.left >> 56 != 0 {
            return Err(Refusal::bad("chunk size too large"));
        }
        self.left = self.left << 4 | u64::from(digit);
        Ok(State::Size)
    }

    fn count(&mut self) -> Result<(), Refusal> {
        use State::*;
        self.overhead += 1;
        let max = match self.state {
            TrailerStart | TrailerName | TrailerValue | TrailerLf | EndLf => TRAILERS_MAX,
            _ => SIZE_LINE_MAX,
        };
        if self.overhead > max { Err(Refusal::bad("chunk size line or trailer too long")) } else { Ok(()) }
    }
}

impl Default for ChunkDecoder {
    fn default() -> Self {
        Self::new()
    }
}

/// What may stand in a field's value: no control bytes but the tab.
fn is_text(b: u8) -> bool {
    b == b'\t' || (b >= b' ' && b != 0x7f)
}

/// Appends the size line of a chunk of `len` bytes; its data and `CRLF` follow. Never call it with 0: that is `LAST_CHUNK`.
pub fn write_chunk_size(len: u64, out: &mut Vec<u8>) {
    let mut text = [0u8; 16];
    let mut at = text.len();
    let mut rest = len;
    loop {
        at -= 1;
        text[at] = b"0123456789abcdef"[(rest & 15) as usize];
        rest >>= 4;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&text[at..]);
    out.extend_from_slice(b"\r\n");
}

/// Ends a chunked body that has no trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits { line: 64, total: 128 };

    fn decode(input: &[u8], step: usize) -> Result<(Vec<u8>, usize), Refusal> {
        let (mut d, mut body, mut at, mut end) = (ChunkDecoder::new(), Vec::new(), 0, step.min(input.len()));
        loop {
            match d.next(&input[at..end])? {
                Chunked::Data { from, to } => {
                    body.extend_from_slice(&input[at + from..at + to]);
                    at += to;
                }
                Chunked::Done { used } => return Ok((body, at + used)),
                Chunked::More if end == input.len() => return Err(Refusal::bad("unfinished")),
                Chunked::More => {
                    at = end;
                    end = (end + step).min(input.len());
                }
            }
        }
    }

    #[test]
    fn decodes_chunks_however_they_are_cut() {
        let input = b"3\r\nabc\r\nA;x=\"y\"\r\n0123456789\r\n0\r\nT: 1\r\nU:\r\n\r\nGET";
        for step in 1..input.len() {
            assert_eq!(decode(input, step), Ok((b"abc0123456789".to_vec(), input.len() - 3)), "step {step}");
        }
    }

    #[test]
    fn refuses_bad_chunks() {
        for bad in [
            &b"\r\n"[..],
            b"x\r\n",
            b"-1\r\n",
            b"+1\r\na",
            b"0x1\r\na",
            b" 1\r\na",
            b"1 \r\na",
            b"1\na\r\n",
            b"1\r\nab\r\n",
            b"1\r\na\n0\r\n\r\n",
            b"1;a\nb\r\n",
            b"1;\0\r\n",
            b"1\ra",
            b"11111111111111111\r\n",
            b"0\r\n\n",
            b"0\r\nno colon\r\n\r\n",
            b"0\r\n T: 1\r\n\r\n",
            b"0\r\nT: 1\n\r\n",
            b"0\r\nT: \0\r\n\r\n",
            b"0\r\n: x\r\n\r\n",
            b"0\r\n\rX",
        ] {
            let got = decode(bad, bad.len());
            assert!(matches!(got, Err(r) if r.why != "unfinished"), "{}: {got:?}", bad.escape_ascii());
        }
    }

    #[test]
    fn bounds_extensions_and_trailers() {
        let long = [b"1;".to_vec(), vec![b'a'; SIZE_LINE_MAX]].concat();
        assert!(decode(&long, long.len()).is_err_and(|r| r.why.contains("too long")));
        let line = b"T: aaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n";
        let long = [b"0\r\n".to_vec(), line.repeat(TRAILERS_MAX / line.len() + 1)].concat();
        assert!(decode(&long, long.len()).is_err_and(|r| r.why.contains("too long")));
    }

    #[test]
    fn a_response_may_pad_its_sizes() {
        let mut d = ChunkDecoder::of_response();
        assert_eq!(d.next(b"1  \r\na"), Ok(Chunked::Data { from: 5, to: 6 }));
    }

    #[test]
    fn encodes_sizes() {
        for (len, text) in [(1, "1\r\n"), (16, "10\r\n"), (0xabcdef, "abcdef\r\n"), (u64::MAX, "ffffffffffffffff\r\n")]
        {
            let mut out = Vec::new();
            write_chunk_size(len, &mut out);
            assert_eq!(out, text.as_bytes());
        }
    }

    #[test]
    fn finds_the_end_of_a_head_however_it_is_cut() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        for cut in 0..head.len() {
            let mut scan = HeadScan::default();
            assert_eq!(scan.next(&head[..cut], LIMITS), Ok(None));
            assert_eq!(scan.next(&[&head[..], b"rest"].concat(), LIMITS), Ok(Some(head.len())));
        }
    }

    #[test]
    fn bounds_a_head_and_refuses_bare_line_feeds() {
        let scan = |input: &[u8]| HeadScan::default().next(input, LIMITS).map_err(|r| r.status);
        assert_eq!(scan(&[b'a'; 65]), Err(414));
        assert_eq!(scan(&[b"GET / HTTP/1.1\r\n".to_vec(), vec![b'a'; 65]].concat()), Err(400));
        assert_eq!(scan(&b"A: 0123456789\r\n".repeat(10)), Err(400));
        assert_eq!(scan(b"GET / HTTP/1.1\nHost: a\r\n\r\n"), Err(400));
        assert_eq!(scan(b"GET / HTTP/1.1\r\n\n"), Err(400));
        assert_eq!(scan(b"\n"), Err(400));
    }

    #[test]
    fn says_how_long_a_body_is() {
        let request = |lengths: &[&str], codings: &[&str], version| {
            let mut f = BodyFields::default();
            lengths.iter().try_for_each(|v| f.content_length(v.as_bytes()))?;
            codings.iter().try_for_each(|v| f.transfer_encoding(v.as_bytes()))?;
            f.of_request(version)
        };
        let v11 = Version::Http11;
        assert_eq!(request(&[], &[], v11), Ok(Framing::None));
        assert_eq!(request(&["12"], &[], v11), Ok(Framing::Length(12)));
        assert_eq!(request(&[], &["Chunked"], v11), Ok(Framing::Chunked));
        let refused: &[(&[&str], &[&str], Version, u16)] = &[
            (&["1"], &["chunked"], v11, 400),
            (&["1", "2"], &[], v11, 400),
            (&["1", "1"], &[], v11, 400),
            (&["1, 1"], &[], v11, 400),
            (&["+1"], &[], v11, 400),
            (&["-1"], &[], v11, 400),
            (&["0x1"], &[], v11, 400),
            (&[""], &[], v11, 400),
            (&["18446744073709551616"], &[], v11, 400),
            (&[], &["chunked", "chunked"], v11, 400),
            (&[], &["chunked, chunked"], v11, 501),
            (&[], &["gzip, chunked"], v11, 501),
            (&[], &["identity"], v11, 501),
            (&[], &["xchunked"], v11, 501),
            (&[], &[""], v11, 501),
            (&[], &["chunked"], Version::Http10, 400),
        ];
        for &(lengths, codings, version, status) in refused {
            let got = request(lengths, codings, version);
            assert!(got.is_err_and(|r| r.status == status), "{lengths:?} {codings:?}: {got:?}");
        }
    }

    #[test]
    fn says_how_long_a_response_body_is() {
        let mut chunked = BodyFields::default();
        assert!(chunked.transfer_encoding(b"chunked").is_ok());
        assert_eq!(chunked.of_response(200, false), Ok(Framing::Chunked));
        assert_eq!(chunked.of_response(200, true), Ok(Framing::None));
        assert_eq!(BodyFields::default().of_response(200, false), Ok(Framing::UntilClose));
        assert_eq!(BodyFields::default().of_response(304, false), Ok(Framing::None));
        let mut both = chunked;
        assert!(both.content_length(b"1").is_ok());
        assert!(both.of_response(200, false).is_err());
    }
}
