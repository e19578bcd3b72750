//! The end of a worker: no request in flight is cut, idle connections close, new ones are refused.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::{Poll, Waker},
};

use crate::exchange::deadline;

/// Counts a worker's connections and tells them to end. Cheap to clone.
#[derive(Clone, Default)]
pub struct Drain(Rc<Inner>);

#[derive(Default)]
struct Inner {
    draining: Cell<bool>,
    open: Cell<usize>,
    waiting: RefCell<Option<Waker>>,
    /// Told of each connection that opens (true) or closes.
    changed: Option<Box<dyn Fn(bool)>>,
}

impl Drain {
    /// Tells `changed` of each connection that opens (true) or closes.
    pub fn telling(changed: impl Fn(bool) + 'static) -> Self {
        Drain(Rc::new(Inner { changed: Some(Box::new(changed)), ..Inner::default() }))
    }

    /// Idle connections close now, the others after their request; listeners stop accepting.
    pub fn begin(&self) {
        self.0.draining.set(true);
        deadline::wake_all();
    }

    pub fn is_draining(&self) -> bool {
        self.0.draining.get()
    }

    /// Connections of this worker that are open.
    pub fn open(&self) -> usize {
        self.0.open.get()
    }

    /// Waits until no connection is open. For one waiter.
    pub async fn done(&self) {
        poll_fn(|cx| {
            if self.open() == 0 {
                return Poll::Ready(());
            }
            *self.0.waiting.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Counts a connection while the result lives.
    pub fn enter(&self) -> Open {
        self.0.open.set(self.0.open.get() + 1);
        self.0.tell(true);
        Open(self.0.clone())
    }
}

impl Inner {
    fn tell(&self, opened: bool) {
        if let Some(changed) = &self.changed {
            changed(opened);
        }
    }
}

/// An open connection.
pub struct Open(Rc<Inner>);

impl Drop for Open {
    fn drop(&mut self) {
        let open = self.0.open.get() - 1;
        self.0.open.set(open);
        self.0.tell(false);
        if open == 0
            && let Some(waker) = self.0.waiting.borrow_mut().take()
        {
            waker.wake();
        }
    }
}
