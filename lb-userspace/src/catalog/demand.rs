//! What a source is told: who uses which service, which DNS and the kernel know, and that its end is
//! near.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{mpsc, oneshot};

/// The wishes that may wait for a source; a flood of lookups beyond that is answered by what is
/// known.
const MAX_WAITING: usize = 1024;

/// Where to say that a service is used. A source that follows everything hears nothing. It stays
/// good when the source is started again, or gives way to another.
#[derive(Clone, Debug, Default)]
pub struct Demand(Arc<RwLock<Option<mpsc::Sender<Wish>>>>);

/// What somebody wants.
#[derive(Debug)]
pub enum Wish {
    /// A service.
    Service(Wanted),
    /// That the source leaves what the next one begins with; told once that is written.
    Leave(oneshot::Sender<()>),
}

/// A service that somebody wants.
#[derive(Debug)]
pub struct Wanted {
    /// Its name, in lower case; perhaps there is none of that name.
    pub name: Arc<str>,
    /// Told once the source has looked it up: whether there is such a service, which is in the
    /// catalog then. Dropped where it can't know.
    pub done: Option<oneshot::Sender<bool>>,
}

impl Demand {
    /// Where a source hears it from now on; who listened before hears nothing more.
    pub fn listen(&self) -> mpsc::Receiver<Wish> {
        let (wishes, inbox) = mpsc::channel(MAX_WAITING);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(wishes);
        inbox
    }

    /// Whether a source listens; else nothing that is said makes a difference.
    pub fn is_heard(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Notes that the service `name`, in lower case, is in use: it becomes live, or stays so.
    pub fn used(&self, name: &str) {
        if let Some(wishes) = self.listener() {
            let _ = wishes.try_send(Wish::Service(Wanted { name: name.into(), done: None }));
        }
    }

    /// The same, and waits until the source has looked it up. Returns whether there is such a
    /// service; then a catalog that has it live is published. The caller sets the limit.
    pub async fn look_up(&self, name: &str) -> bool {
        let Some(wishes) = self.listener() else { return false };
        let (done, looked_up) = oneshot::channel();
        let wanted = Wanted { name: name.into(), done: Some(done) };
        wishes.try_send(Wish::Service(wanted)).is_ok() && looked_up.await.unwrap_or(false)
    }

    /// Waits until the source has left what the next one begins with, or can't. The caller sets the
    /// limit.
    pub(super) async fn leave(&self) {
        let Some(wishes) = self.listener() else { return };
        let (done, left) = oneshot::channel();
        if wishes.try_send(Wish::Leave(done)).is_ok() {
            let _ = left.await;
        }
    }

    /// Where who listens now hears it.
    pub(super) fn listener(&self) -> Option<mpsc::Sender<Wish>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
