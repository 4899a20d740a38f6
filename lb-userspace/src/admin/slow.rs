//! A stream that fails when its reader is too slow.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// The bytes that a reader that is behind has to read in each period: 6.5 kB a second.
const MIN_BYTES: usize = 64 << 10;

/// How long slow clients are waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// The time limit of a request's head, the pause before it included.
    pub(super) head: Duration,
    /// The period in which a reader that is behind has to read [`MIN_BYTES`].
    pub(super) period: Duration,
    /// The longest that a response may wait for its reader: the few documents in memory must become free
    /// for others.
    pub(super) max_time: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        let seconds = Duration::from_secs;
        Patience { head: seconds(10), period: seconds(10), max_time: seconds(30) }
    }
}

/// A stream that fails once its reader has read less than [`MIN_BYTES`] in a period while there is
/// more to read, or hasn't read a response within its longest time from its first wait. A client that reads
/// little would otherwise keep its connection and its document for as long as its kernel acknowledges
/// zero windows. A stream of lines or events has no end, so only its rate is bounded: where little happens,
/// its reader is never behind for a whole period.
pub(super) struct MinRate<S> {
    stream: S,
    is_endless: IsEndless,
    patience: Patience,
    /// The end of the present response's time, once a write has waited for the reader.
    deadline: Option<Instant>,
    /// While the reader is behind, or was when this period began.
    behind: Option<Behind>,
}

/// Whether the present response is a stream of lines.
#[derive(Clone, Debug, Default)]
pub(super) struct IsEndless(Arc<AtomicBool>);

impl IsEndless {
    pub(super) fn set(&self, is_endless: bool) {
        self.0.store(is_endless, Ordering::Relaxed);
    }
}

struct Behind {
    until: Pin<Box<Sleep>>,
    n_bytes: usize,
}

impl<S> MinRate<S> {
    pub(super) fn new(stream: S, is_endless: IsEndless, patience: Patience) -> MinRate<S> {
        MinRate { stream, is_endless, patience, deadline: None, behind: None }
    }

    /// The result of a write, given that of the stream below.
    fn judge(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let is_pending = written.is_pending();
        let is_endless = self.is_endless.0.load(Ordering::Relaxed);
        if is_pending && self.deadline.is_none() && !is_endless {
            self.deadline = Some(Instant::now() + self.patience.max_time);
        }
        let deadline = self.deadline;
        let next = |period| {
            let end = Instant::now() + period;
            deadline.map_or(end, |deadline| deadline.min(end))
        };
        if self.behind.is_none() && is_pending {
            let until = Box::pin(tokio::time::sleep_until(next(self.patience.period)));
            self.behind = Some(Behind { until, n_bytes: 0 });
        }
        let Some(behind) = &mut self.behind else { return written };
        if let Poll::Ready(Ok(n)) = written {
            behind.n_bytes += n;
        }
        while behind.until.as_mut().poll(context).is_ready() {
            if !is_pending {
                self.behind = None;
                return written;
            }
            let is_over = deadline.is_some_and(|deadline| deadline <= Instant::now());
            if behind.n_bytes < MIN_BYTES || is_over {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            behind.n_bytes = 0;
            behind.until.as_mut().reset(next(self.patience.period));
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MinRate<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MinRate<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.judge(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes after a response.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.deadline = None;
        self.behind = None;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(600);

    fn within<S>(stream: S, period: Duration, max_time: Duration) -> MinRate<S> {
        MinRate::new(
            stream,
            IsEndless::default(),
            Patience { period, max_time, ..Patience::default() },
        )
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_left() {
        let (stream, _reader) = duplex(1024);
        let mut stream = within(stream, SHORT, LONG);
        stream.write_all(&[0; 1024]).await.unwrap();
        let error = stream.write_all(&[0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_reader_that_takes_a_byte_now_and_then_is_left() {
        for is_endless in [false, true] {
            let (stream, mut reader) = duplex(1024);
            let mut stream = within(stream, SHORT, LONG);
            stream.is_endless.set(is_endless);
            let trickle = async {
                // It ends with the stream.
                while reader.read_u8().await.is_ok() {
                    tokio::time::sleep(SHORT / 4).await;
                }
            };
            let write = async {
                let error = stream.write_all(&vec![0; 1 << 20]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                drop(stream);
            };
            tokio::join!(trickle, write);
        }
    }

    /// It reads more than [`MIN_BYTES`] in the period that the deadline cuts short.
    #[tokio::test]
    async fn a_reader_that_takes_too_long_over_a_response_is_left() {
        let (stream, mut reader) = duplex(64 << 10);
        let mut stream = within(stream, LONG, Duration::from_secs(1));
        let read = async {
            let (mut buffer, mut n_read) = (vec![0; 64 << 10], 0);
            while let Ok(n @ 1..) = reader.read(&mut buffer).await {
                n_read += n;
            }
            assert!(n_read > 4 * MIN_BYTES, "the rate cut it off, not the deadline: {n_read}");
        };
        let write = async {
            let error = loop {
                if let Err(error) = stream.write_all(&[0; 128 << 10]).await {
                    break error;
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            drop(stream);
        };
        tokio::join!(read, write);
    }

    #[tokio::test]
    async fn a_stream_lasts_for_as_long_as_its_reader_keeps_up() {
        let (stream, mut reader) = duplex(64 << 10);
        let mut stream = within(stream, LONG, SHORT);
        stream.is_endless.set(true);
        let start = Instant::now();
        let read = async {
            let mut buffer = vec![0; 64 << 10];
            while start.elapsed() < 5 * SHORT {
                reader.read_exact(&mut buffer).await.unwrap();
            }
        };
        let write = async { while stream.write_all(&[0; 4 << 10]).await.is_ok() {} };
        tokio::select! {
            () = read => {}
            () = write => panic!("it was cut off"),
        }
    }

    #[tokio::test]
    async fn each_response_has_its_own_time() {
        let (stream, mut reader) = duplex(1024);
        let mut stream = within(stream, LONG, LONG);
        let read = async { while reader.read_u8().await.is_ok() {} };
        let write = async {
            stream.write_all(&[0; 2048]).await.unwrap();
            assert!(stream.deadline.is_some(), "it waited");
            stream.flush().await.unwrap();
            assert!(stream.deadline.is_none() && stream.behind.is_none());
            drop(stream);
        };
        tokio::join!(read, write);
    }

    #[tokio::test]
    async fn a_reader_that_keeps_up_is_served() {
        let (stream, mut reader) = duplex(64 << 10);
        let mut stream = within(stream, LONG, LONG);
        let all = vec![7; 4 << 20];
        let (written, read) = tokio::join!(
            async {
                stream.write_all(&all).await?;
                stream.shutdown().await
            },
            async {
                let mut read = Vec::new();
                reader.read_to_end(&mut read).await.map(|_| read.len())
            }
        );
        written.unwrap();
        assert_eq!(read.unwrap(), all.len());
    }
}
