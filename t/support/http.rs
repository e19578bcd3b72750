//! A small HTTP/1 client that hides nothing: what it sends is what the test says.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use serde_json::Value;

use super::DEADLINE;

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {} {}", self.status, self.text()))
    }
}

pub fn get(address: &str, path: &str) -> Reply {
    request(address, "GET", path, &[], b"")
}

/// One request on a connection of its own.
#[track_caller]
pub fn request(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut client = Client::connect(address);
    client.send(method, path, headers, body);
    client.reply(method)
}

/// Sends bytes as they are and returns everything until the peer closes.
pub fn raw(address: &str, bytes: &[u8]) -> String {
    let mut stream = connect(address);
    // The peer may answer and close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut out = Vec::new();
    let _ = stream.read_to_end(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap_or_else(|e| panic!("connect to {address}: {e}"));
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.set_write_timeout(Some(DEADLINE)).expect("a timeout");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// A keep-alive connection.
pub struct Client {
    address: String,
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(address: &str) -> Self {
        Client { address: address.to_owned(), stream: BufReader::new(connect(address)) }
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("host")) {
            head += &format!("Host: {}\r\n", self.address);
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        head += "\r\n";
        self.write(head.as_bytes()).expect("the head is written");
        self.write(body).expect("the body is written");
    }

    /// The status line and headers.
    #[track_caller]
    pub fn head(&mut self) -> Reply {
        let line = self.line();
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {line:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                return Reply { status, headers, body: Vec::new() };
            }
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("no header: {line:?}"));
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// A whole answer.
    #[track_caller]
    pub fn reply(&mut self, method: &str) -> Reply {
        let mut reply = self.head();
        while reply.status / 100 == 1 && reply.status != 101 {
            reply = self.head();
        }
        if method == "HEAD" || matches!(reply.status, 101 | 204 | 304) {
            return reply;
        }
        if reply.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
            while let Some(chunk) = self.chunk() {
                reply.body.extend(chunk);
            }
        } else if let Some(length) = reply.header("content-length") {
            reply.body = vec![0; length.parse().expect("a length")];
            self.stream.read_exact(&mut reply.body).expect("the body");
        } else {
            self.stream.read_to_end(&mut reply.body).expect("the body");
        }
        reply
    }

    /// The next chunk of a chunked body; `None` at its end.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.line();
        let length = usize::from_str_radix(line.split(';').next().unwrap_or(""), 16);
        let length = length.unwrap_or_else(|_| panic!("no chunk size: {line:?}"));
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).expect("a chunk");
        assert_eq!(self.line(), "", "a chunk ends with a line break");
        (length > 0).then_some(data)
    }

    /// Bytes of the body as they come; empty at the end.
    pub fn some(&mut self) -> Vec<u8> {
        let data = self.stream.fill_buf().expect("readable").to_vec();
        self.stream.consume(data.len());
        data
    }

    /// Whether the peer has closed: reads to the end.
    pub fn closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("a line");
        assert!(line.ends_with("\r\n"), "a whole line, not {line:?}");
        line.trim_end_matches(['\r', '\n']).to_owned()
    }
}

/// What comes behind the head of a 101.
impl Read for Client {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.stream.read(into)
    }
}
