//! Answers of HTTP/1: as much of them as load needs.

/// The longest head, in bytes.
const MAX_HEAD: usize = 64 * 1024;

/// As much of a body's first line as is kept, in bytes.
const MAX_NAME: usize = 64;

/// What isn't an answer that this understands; chunked bodies are among that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Malformed;

/// A whole answer.
#[derive(Debug, PartialEq)]
pub struct Complete<'a> {
    /// 200 where all is well.
    pub status: u16,
    /// Whether another request may follow on the connection.
    pub keep_alive: bool,
    /// The first line of the body, trimmed, and no longer than 64 bytes.
    pub name: &'a [u8],
}

/// An answer while it arrives.
#[derive(Default)]
pub struct Answer {
    /// The head and the beginning of the body, where they didn't come at once.
    kept: Vec<u8>,
    head: Option<Head>,
    n_received: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Head {
    status: u16,
    keep_alive: bool,
    /// Length with the empty line, in bytes.
    n_head: usize,
    /// Length of the body in bytes; without it the body lasts until the connection ends.
    n_body: Option<u64>,
}

impl Answer {
    /// Takes what arrived; the answer, once it is whole.
    ///
    /// # Errors
    /// When it isn't one.
    pub fn feed<'a>(&'a mut self, bytes: &'a [u8]) -> Result<Option<Complete<'a>>, Malformed> {
        let is_first = self.n_received == 0;
        self.n_received += bytes.len() as u64;
        if is_first {
            self.head = Head::parse(bytes)?;
            if let Some(head) = self.head
                && head.is_whole(self.n_received)
            {
                return Ok(Some(head.complete(bytes, self.n_received)));
            }
        }
        let most = self.head.map_or(MAX_HEAD, |head| head.n_head + MAX_NAME);
        let n_more = most.saturating_sub(self.kept.len()).min(bytes.len());
        self.kept.extend_from_slice(&bytes[..n_more]);
        if self.head.is_none() {
            self.head = Head::parse(&self.kept)?;
        }
        match self.head {
            None if self.kept.len() >= MAX_HEAD => Err(Malformed),
            None => Ok(None),
            Some(head) => Ok(head
                .is_whole(self.n_received)
                .then(|| head.complete(&self.kept, self.n_received))),
        }
    }

    /// The answer, if it is one that the end of its connection completes.
    pub fn end(&self) -> Option<Complete<'_>> {
        let head = self.head.filter(|head| head.n_body.is_none())?;
        Some(Complete { keep_alive: false, ..head.complete(&self.kept, self.n_received) })
    }

    /// Makes room for the next answer.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.head = None;
        self.n_received = 0;
    }
}

impl Head {
    /// `None` when there isn't all of it yet.
    fn parse(bytes: &[u8]) -> Result<Option<Head>, Malformed> {
        let begin = b"HTTP/1.";
        let n_begin = bytes.len().min(begin.len());
        if bytes[..n_begin] != begin[..n_begin] {
            return Err(Malformed);
        }
        let Some(n_lines) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
            return Ok(None);
        };
        let mut lines = bytes[..n_lines].split(|byte| *byte == b'\n');
        let first = lines.next().ok_or(Malformed)?;
        let status: u16 = number(first.get(9..12).ok_or(Malformed)?)?;
        let mut head = Head {
            status,
            keep_alive: first[7] == b'1',
            n_head: n_lines + 4,
            n_body: matches!(status, 204 | 304).then_some(0),
        };
        for line in lines {
            let colon = line.iter().position(|byte| *byte == b':').ok_or(Malformed)?;
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if name.eq_ignore_ascii_case(b"content-length") {
                head.n_body = Some(number(value)?);
            } else if name.eq_ignore_ascii_case(b"connection") {
                head.keep_alive = !value.eq_ignore_ascii_case(b"close")
                    && (head.keep_alive || value.eq_ignore_ascii_case(b"keep-alive"));
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                return Err(Malformed);
            }
        }
        Ok(Some(head))
    }

    fn is_whole(&self, n_received: u64) -> bool {
        self.n_body.is_some_and(|n_body| n_received >= (self.n_head as u64).saturating_add(n_body))
    }

    /// `bytes` begins with the head; what came beyond the body makes the connection useless.
    fn complete<'a>(&self, bytes: &'a [u8], n_received: u64) -> Complete<'a> {
        let n_body = self.n_body.unwrap_or(u64::MAX);
        let body = &bytes[self.n_head.min(bytes.len())..];
        let body = &body[..body.len().min(usize::try_from(n_body).unwrap_or(usize::MAX))];
        let keep_alive =
            self.keep_alive && (self.n_head as u64).saturating_add(n_body) == n_received;
        Complete { status: self.status, keep_alive, name: first_line(body) }
    }
}

/// The first line, trimmed, and no longer than 64 bytes.
fn first_line(body: &[u8]) -> &[u8] {
    let line = body.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii();
    &line[..line.len().min(MAX_NAME)]
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Result<T, Malformed> {
    let text = std::str::from_utf8(digits).map_err(|_| Malformed)?;
    text.parse().map_err(|_| Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Status, whether it keeps the connection, and name.
    type Expected = Result<Option<(u16, bool, &'static str)>, Malformed>;

    fn own(complete: Complete<'_>) -> (u16, bool, String) {
        let Complete { status, keep_alive, name } = complete;
        (status, keep_alive, String::from_utf8_lossy(name).into_owned())
    }

    /// However an answer is cut, it means the same.
    fn check(text: &str, expected: &Expected) {
        for n_first in 0..text.len() {
            let mut answer = Answer::default();
            let (first, second) = text.as_bytes().split_at(n_first);
            let mut outcome = Ok(None);
            for part in [first, second].into_iter().filter(|part| !part.is_empty()) {
                outcome = answer.feed(part).map(|complete| complete.map(own));
                if outcome != Ok(None) {
                    break;
                }
            }
            // What came beyond an answer may come too late to be noticed here.
            if let (Ok(Some(got)), Ok(Some(want))) = (&outcome, expected) {
                assert_eq!((got.0, got.2.as_str()), (want.0, want.2), "{text:?} at {n_first}");
                assert!(got.1 == want.1 || n_first > 0, "{text:?} at {n_first}");
            } else {
                let expected =
                    expected.map(|some| some.map(|(s, k, name)| (s, k, name.to_owned())));
                assert_eq!(outcome, expected, "{text:?} at {n_first}");
            }
        }
    }

    #[test]
    fn answers() {
        let table: &[(&str, Expected)] = &[
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nb1\n", Ok(Some((200, true, "b1")))),
            ("HTTP/1.1 200 OK\r\ncontent-length:0\r\n\r\n", Ok(Some((200, true, "")))),
            (
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 7\r\n\r\n b1 \nb2",
                Ok(Some((200, false, "b1"))),
            ),
            ("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nb1", Ok(Some((200, false, "b1")))),
            (
                "HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\nb1",
                Ok(Some((200, true, "b1"))),
            ),
            ("HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n", Ok(Some((503, true, "")))),
            ("HTTP/1.1 204 No Content\r\n\r\n", Ok(Some((204, true, "")))),
            ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nb1HTTP", Ok(Some((200, false, "b1")))),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nb1", Ok(None)),
            ("HTTP/1.1 200 OK\r\nContent-Le", Ok(None)),
            ("HTTP/1.1 200 OK\r\n\r\nb1", Ok(None)),
            ("HTTP/1.1 2x0 OK\r\n\r\n", Err(Malformed)),
            ("HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", Err(Malformed)),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Err(Malformed)),
            ("SSH-2.0-server\r\n", Err(Malformed)),
        ];
        for (text, expected) in table {
            check(text, expected);
        }
    }

    #[test]
    fn the_end_completes_an_answer_without_a_length() {
        let table: &[(&str, Option<&str>)] = &[
            ("HTTP/1.1 200 OK\r\n\r\nb1\nb2", Some("b1")),
            ("HTTP/1.1 200 OK\r\n\r\n", Some("")),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nb1", None),
            ("HTTP/1.1 200 OK\r\n", None),
            ("", None),
        ];
        for (text, expected) in table {
            let mut answer = Answer::default();
            assert_eq!(answer.feed(text.as_bytes()), Ok(None), "{text:?}");
            let ended = answer.end().map(own);
            assert_eq!(ended, expected.map(|name| (200, false, name.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn a_long_body_is_counted_and_not_kept() {
        let mut answer = Answer::default();
        let n_body = 1_000_000;
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {n_body}\r\n\r\n");
        assert_eq!(answer.feed(head.as_bytes()), Ok(None));
        let piece = [b'x'; 1000];
        for _ in 1..n_body / piece.len() {
            assert_eq!(answer.feed(&piece), Ok(None));
        }
        assert!(answer.kept.len() <= head.len() + MAX_NAME);
        let complete = answer.feed(&piece).unwrap().map(own);
        assert_eq!(complete, Some((200, true, "x".repeat(MAX_NAME))));
    }
}
