//! TLS on both sides: certificates by SNI for clients (`server`), configurations for upstreams (`client`); what an issuer says of a
//! certificate (`ocsp`).
//!
//! rustls with ring: TLS 1.2 and 1.3. What is parsed is kept by the version of the object it came from.

pub mod client;
pub mod hello;
pub mod ocsp;
pub mod scripted;
pub mod secrets;
pub mod server;

use std::borrow::Cow;

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

pub use client::{ChainTooLong, client_config, client_config_of, client_config_trusting};
pub use scripted::{Scripts, Watched, store};
pub use secrets::Secrets;
pub use server::{Server, ServerOptions};

use crate::{
    error::{Error, Kind, Result},
    model,
};

/// The versions that `names` (`TLSv1.2`) allow and that exist here, and the names that do not.
pub fn versions<'a>(
    names: impl IntoIterator<Item = &'a str>,
) -> (Vec<&'static rustls::SupportedProtocolVersion>, Vec<&'a str>) {
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for name in names {
        match name {
            "TLSv1.2" => known.push(&rustls::version::TLS12),
            "TLSv1.3" => known.push(&rustls::version::TLS13),
            other => unknown.push(other),
        }
    }
    (known, unknown)
}

/// The certificates of a PEM text; at least one.
pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let pem = resolved(pem)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(Error::config(Kind::Tls).context("no certificate in the PEM text")),
        Ok(chain) => Ok(chain),
        Err(e) => Err(Error::config(Kind::Tls).cause(e).context("parse a certificate")),
    }
}

pub(crate) fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(resolved(pem)?.as_bytes())
        .map_err(|e| Error::config(Kind::Tls).cause(e).context("parse a private key"))
}

/// What a reference stands for (terminology/secret.md): `$env://NAME` for a variable of the environment, `$env://NAME/key` for a text in
/// the JSON that it holds. Other texts stand for themselves. What managers of secrets have is fetched before (`secrets`).
fn resolved(text: &str) -> Result<Cow<'_, str>> {
    if !model::crypt::is_reference(text) {
        return Ok(Cow::Borrowed(text));
    }
    let failed =
        |why: &str| Error::config(Kind::Tls).context(format!("failed to resolve secret reference: {text}: {why}"));
    let Some(name) = secrets::of_environment(text) else {
        return Err(failed("what asks for it cannot ask managers of secrets; use $env://"));
    };
    tracing::info!("fetching data from env uri: {text}");
    let (name, key) = name.split_once('/').map_or((name, None), |(name, key)| (name, Some(key)));
    let value = std::env::var(name).map_err(|_| failed("there is no such variable"))?;
    let Some(key) = key else { return Ok(Cow::Owned(value)) };
    let json: serde_json::Value = serde_json::from_str(&value).map_err(|_| failed("the variable holds no JSON"))?;
    let text = json.get(key).and_then(serde_json::Value::as_str).ok_or_else(|| failed("the JSON has no such text"))?;
    Ok(Cow::Owned(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_stand_for_variables_of_the_environment() {
        let path = std::env::var("PATH").expect("it is set");
        for reference in ["$env://PATH", "$ENV://PATH"] {
            assert_eq!(resolved(reference).expect("resolved"), path);
        }
        assert_eq!(resolved("-----BEGIN").expect("a text"), "-----BEGIN");
        for (reference, why) in [
            ("$env://NO_SUCH_THING_AT_ALL", "there is no such variable"),
            ("$env://PATH/key", "the variable holds no JSON"),
            ("$secret://vault/1/a/b", "what asks for it cannot ask managers of secrets"),
        ] {
            let told = resolved(reference).expect_err(reference).to_string();
            assert!(told.contains(why) && told.contains(reference), "{told}");
        }
    }
}
