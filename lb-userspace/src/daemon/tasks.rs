//! The daemon's tasks.

use std::collections::HashMap;

use tokio::runtime::Handle;
use tokio::task::{Id, JoinSet};

/// Tasks that run as long as the daemon.
#[derive(Default)]
pub struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// Spawns one on this runtime.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_on(name, task, &Handle::current());
    }

    /// Spawns it on another runtime.
    pub fn spawn_on(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
        runtime: &Handle,
    ) {
        self.names.insert(self.running.spawn_on(task, runtime).id(), name);
    }

    /// Ends them, and waits until they have.
    pub async fn stop(&mut self) {
        self.running.shutdown().await;
    }

    /// Waits until one ends, which only a defect causes. Returns its name.
    pub async fn ended(&mut self) -> &'static str {
        let id = match self.running.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(error)) => error.id(),
            None => return std::future::pending().await,
        };
        self.names.get(&id).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_named() {
        let mut tasks = Tasks::default();
        tasks.spawn("one that goes on", std::future::pending());
        tasks.spawn("one with a defect", async { panic!("a defect") });
        assert_eq!(tasks.ended().await, "one with a defect");
    }
}
