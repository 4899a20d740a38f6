//! The bodies of responses: a document, or parts as they come.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::{BoxStream, StreamExt as _};
use hyper::body::{Body, Bytes, Frame, SizeHint};

/// The body of a response.
pub(super) enum ResponseBody {
    /// As a whole; `None` once it was taken.
    Document(Option<Bytes>),
    /// Lines or events, until their sender ends.
    Stream(BoxStream<'static, Bytes>),
}

impl From<Bytes> for ResponseBody {
    fn from(document: Bytes) -> ResponseBody {
        ResponseBody::Document(Some(document).filter(|document| !document.is_empty()))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = match &mut *self {
            ResponseBody::Document(document) => Poll::Ready(document.take()),
            ResponseBody::Stream(parts) => parts.poll_next_unpin(context),
        };
        data.map(|data| data.map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, ResponseBody::Document(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ResponseBody::Document(document) => {
                SizeHint::with_exact(document.as_ref().map_or(0, |document| document.len() as u64))
            }
            ResponseBody::Stream(_) => SizeHint::default(),
        }
    }
}
