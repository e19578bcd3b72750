//! The scripts of `lua_server` that have a say in TLS handshakes, and the managers of secrets, as the TLS side reaches them.

use std::{rc::Rc, sync::Arc};

use super::Proxy;
use crate::{
    conf::locations::{Handshakes, Script},
    error::Result,
    exchange::{Exchange, Phase, host::Doing},
    tls,
};

/// `None` when there is no such script: handshakes then stay what they are.
pub fn scripts(proxy: &Rc<Proxy>, scripts: &Handshakes) -> Option<Rc<dyn tls::Scripts>> {
    let of = Of { proxy: proxy.clone(), scripts: scripts.clone() };
    let phases = [Phase::SslClientHello, Phase::SslSessionFetch, Phase::Ssl, Phase::SslSessionStore];
    phases.into_iter().any(|phase| of.script(phase).is_some()).then(|| Rc::new(of) as Rc<dyn tls::Scripts>)
}

impl tls::Secrets for Proxy {
    fn fetch<'a>(&'a self, reference: &'a str) -> Doing<'a, Result<Box<str>>> {
        Box::pin(async move { self.runner.secret(reference, &self.snapshot()).await })
    }
}

struct Of {
    proxy: Rc<Proxy>,
    scripts: Handshakes,
}

impl Of {
    fn script(&self, phase: Phase) -> Option<&Arc<Script>> {
        match phase {
            Phase::SslClientHello => self.scripts.client_hello.as_ref(),
            Phase::SslSessionFetch => self.scripts.session_fetch.as_ref(),
            Phase::Ssl => self.scripts.certificate.as_ref(),
            Phase::SslSessionStore => self.scripts.session_store.as_ref(),
            _ => None,
        }
    }
}

impl tls::Scripts for Of {
    fn has(&self, phase: Phase) -> bool {
        self.script(phase).is_some()
    }

    fn run<'a>(&'a self, x: &'a mut Exchange, phase: Phase) -> Doing<'a, Result<()>> {
        Box::pin(async move {
            match self.script(phase) {
                Some(script) => self.proxy.runner.handshake(x, script, phase).await,
                None => Ok(()),
            }
        })
    }

    fn end(&self, x: &mut Exchange) {
        self.proxy.runner.end_handshake(x);
    }
}
