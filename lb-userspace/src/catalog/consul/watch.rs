//! A blocking query, asked for ever.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::backoff::{Backoff, Bucket};
use super::client::{Client, QueryError, Question};
use super::index::{Ask, Cursor, Verdict};

/// What came of a question.
#[derive(Debug)]
pub enum Report<T> {
    /// The state of now.
    News(T),
    /// Consul is well and has no news.
    Alive,
    /// No answer. What was known stays.
    Failed(QueryError),
}

/// What to watch.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The path, percent-encoded.
    pub path: String,
    /// Whether it has a connection of its own.
    pub is_reserved: bool,
    /// How long an answer that isn't held back may take.
    pub answer_limit: Duration,
}

/// Asks for ever, and reports what comes of each question. `wait` is how long Consul may hold one;
/// when it shrinks, a longer question under way is dropped and asked anew, so that its connection
/// comes free.
///
/// A question without an answer for 1.5 times its wait counts as lost: Consul adds up to 1/16.
pub async fn run<T: DeserializeOwned>(
    client: Arc<Client>,
    watched: Watched,
    mut wait: watch::Receiver<Duration>,
    mut report: impl FnMut(Report<T>),
) {
    let mut cursor = Cursor::default();
    let mut backoff = Backoff::default();
    let mut bucket = Bucket::new(Instant::now());
    loop {
        tokio::time::sleep(bucket.take(Instant::now())).await;
        let question = Question {
            path: watched.path.clone(),
            ask: cursor.ask(),
            wait: *wait.borrow_and_update(),
            is_reserved: watched.is_reserved,
        };
        let limit = match question.ask {
            Ask::After(_) => (question.wait * 3 / 2).max(watched.answer_limit),
            Ask::Now | Ask::Consistently => watched.answer_limit,
        };
        let answer = tokio::select! {
            answer = client.get::<T>(&question, limit) => answer,
            () = shrinks(&mut wait, question.wait) => continue,
        };
        match answer {
            Ok(answer) => match cursor.answered(answer.index) {
                Verdict::Apply => {
                    backoff.reset();
                    report(Report::News(answer.body));
                }
                Verdict::Unchanged => {
                    backoff.reset();
                    report(Report::Alive);
                }
                Verdict::Confirm => {
                    tracing::info!(
                        path = watched.path,
                        index = answer.index,
                        "Consul's index went backwards; asking again before believing it"
                    );
                    report(Report::Alive);
                    tokio::time::sleep(backoff.pause(fastrand::f64())).await;
                }
            },
            Err(error) => {
                cursor.failed();
                report(Report::Failed(error));
                tokio::time::sleep(backoff.pause(fastrand::f64())).await;
            }
        }
    }
}

/// Waits until the wait is shorter than that of the question under way.
async fn shrinks(wait: &mut watch::Receiver<Duration>, asked: Duration) {
    if wait.wait_for(|wait| *wait < asked).await.is_err() {
        pending().await
    }
}
