//! Upstreams for tests: what they got is kept, what they answer is the test's.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use serde_json::{Map, Value, json};

use super::ports;

/// A request as the upstream saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    fn json(&self) -> Value {
        let mut headers = Map::new();
        for (name, value) in &self.headers {
            headers.insert(name.to_ascii_lowercase(), json!(value));
        }
        let body = String::from_utf8_lossy(&self.body);
        json!({"method": self.method, "uri": self.target, "headers": headers, "body": body})
    }
}

/// A server on a free port; it ends with the test program.
#[derive(Clone)]
pub struct Upstream {
    addr: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
}

impl Upstream {
    /// Answers each request with its description as JSON.
    pub fn echo() -> Self {
        Self::answering(|seen| {
            let body = seen.json().to_string();
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        })
    }

    /// Answers each request with the bytes that `answer` returns. `Connection: close` in them closes.
    pub fn answering<B: AsRef<[u8]>>(answer: impl Fn(&Seen) -> B + Send + Sync + 'static) -> Self {
        Self::serving(move |up, stream| {
            let mut stream = BufReader::new(stream);
            while let Some(seen) = read_request(&mut stream) {
                up.seen.lock().expect("not poisoned").push(seen.clone());
                let out = answer(&seen);
                let closes = String::from_utf8_lossy(out.as_ref()).to_ascii_lowercase().contains("connection: close");
                if stream.get_mut().write_all(out.as_ref()).is_err() || closes {
                    return;
                }
            }
        })
    }

    /// Calls `serve` for each connection, in a thread of its own.
    pub fn serving(serve: impl Fn(&Upstream, TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("an address").to_string();
        let upstream = Upstream { addr, seen: Arc::default(), connections: Arc::default() };
        let (me, serve) = (upstream.clone(), Arc::new(serve));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                me.connections.fetch_add(1, Ordering::SeqCst);
                let (me, serve) = (me.clone(), serve.clone());
                thread::spawn(move || serve(&me, stream));
            }
        });
        upstream
    }

    pub fn addr(&self) -> String {
        self.addr.clone()
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("not poisoned").clone()
    }

    pub fn last(&self) -> Seen {
        self.seen().pop().expect("a request came")
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// An address at which nothing listens.
    pub fn dead() -> String {
        format!("127.0.0.1:{}", ports::dead_port())
    }
}

/// Reads one request, `None` when the peer is done.
pub fn read_request(stream: &mut BufReader<TcpStream>) -> Option<Seen> {
    let line = read_line(stream)?;
    let mut parts = line.split(' ');
    let (method, target) = (parts.next()?.to_owned(), parts.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let line = read_line(stream)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut seen = Seen { method, target, headers, body: Vec::new() };
    if let Some(length) = seen.header("content-length") {
        seen.body = vec![0; length.parse().ok()?];
        stream.read_exact(&mut seen.body).ok()?;
    } else if seen.header("transfer-encoding").is_some() {
        loop {
            let length = usize::from_str_radix(&read_line(stream)?, 16).ok()?;
            let mut chunk = vec![0; length];
            stream.read_exact(&mut chunk).ok()?;
            read_line(stream)?;
            if length == 0 {
                break;
            }
            seen.body.extend(chunk);
        }
    }
    Some(seen)
}

fn read_line(stream: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = String::new();
    let n = stream.read_line(&mut line).ok()?;
    (n > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())
}
