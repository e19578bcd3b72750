//! Directives about what leaves: error pages, the charset, compression. Names, values and defaults are nginx's.

use serde_json::Value;

use super::{
    directives::Reader,
    locations::{Piece, Template},
    typed,
};

/// `error_page code… [=[status]] target`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorPage {
    pub codes: Vec<u16>,
    pub status: PageStatus,
    /// A path, `@name` or a URL.
    pub target: Template,
}

/// What an error page is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageStatus {
    /// The status that it is for.
    Same,
    /// `=`: what it says itself.
    Own,
    /// `=200`
    Given(u16),
}

/// `charset name`
#[derive(Clone, Debug)]
pub struct Charset {
    pub name: Box<str>,
    /// `charset_types`
    pub types: Types,
}

/// `gzip on`
#[derive(Clone, Debug)]
pub struct Gzip {
    /// `gzip_types`
    pub types: Types,
    /// Bytes; of a body whose length is not known ahead nobody can tell.
    pub min_length: u64,
    /// 1 to 9.
    pub level: u32,
    /// `Vary: Accept-Encoding`
    pub vary: bool,
    /// Clients of HTTP/1.0, too (`gzip_http_version 1.0`).
    pub http10: bool,
    /// What came by another proxy, too (`gzip_proxied any`).
    pub proxied: bool,
}

/// Media types without parameters.
#[derive(Clone, Debug)]
pub struct Types(Vec<Box<str>>);

impl Types {
    /// Whether a `Content-Type` is one of them. `text/html` always is, `*` stands for all.
    pub fn has(&self, content_type: &[u8]) -> bool {
        let kind = content_type.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
        kind.eq_ignore_ascii_case(b"text/html")
            || self.0.iter().any(|one| **one == *"*" || kind.eq_ignore_ascii_case(one.as_bytes()))
    }

    fn read(r: &Reader<'_>, name: &str, default: &str) -> Types {
        Self::of(r.options.get(name).unwrap_or(default))
    }

    fn of(words: &str) -> Types {
        Types(words.split_whitespace().map(Box::from).collect())
    }
}

/// What nginx names a charset for.
const CHARSET_TYPES: &str = "text/xml text/plain text/vnd.wap.wml application/javascript application/rss+xml";

const ROUTES_CHARSET: &str = "/nginx_config/http/charset";

/// RFC 2978, 2.3, and what older names have. Nothing of it ends a field or begins a variable.
fn is_charset(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#%&'+-^_`{}~.:".contains(&b))
}

impl Charset {
    pub(super) fn read(r: &Reader<'_>) -> Option<Charset> {
        let name = r.options.get("charset").filter(|name| *name != "off")?;
        Some(Charset { name: name.into(), types: Types::read(r, "charset_types", CHARSET_TYPES) })
    }

    /// `nginx_config.http.charset` of the effective configuration: for all responses but those of locations, which have their own.
    pub fn of_routes(config: &Value) -> Option<Charset> {
        let name = config.pointer(ROUTES_CHARSET)?.as_str().filter(|name| *name != "off" && is_charset(name))?;
        Some(Charset { name: name.into(), types: Types::of(CHARSET_TYPES) })
    }

    /// Why nothing can be named that `nginx_config.http.charset` says.
    pub(super) fn mistake_of_routes(config: &Value) -> Option<String> {
        let written = config.pointer(ROUTES_CHARSET).filter(|written| !written.is_null())?;
        let is_good = written.as_str().is_some_and(is_charset);
        (!is_good).then(|| format!("{written} is not the name of a charset, as utf-8, or off"))
    }
}

impl Gzip {
    /// Shorter ones grow, nearly.
    const MIN_LENGTH: u64 = 20;
    const LEVEL: u32 = 1;

    pub(super) fn read(r: &mut Reader<'_>) -> Option<Gzip> {
        let on = r.on("gzip", false);
        let level = |text: &str| text.parse().ok().filter(|level| (1..=9).contains(level));
        let one_of = |no: &'static str, yes: &'static str| {
            move |text: &str| match text {
                _ if text == no => Some(false),
                _ if text == yes => Some(true),
                _ => None,
            }
        };
        let gzip = Gzip {
            types: Types::read(r, "gzip_types", ""),
            min_length: r.value("gzip_min_length", "a size as 1k", typed::size).unwrap_or(Self::MIN_LENGTH),
            level: r.value("gzip_comp_level", "a level from 1 to 9", level).unwrap_or(Self::LEVEL),
            vary: r.on("gzip_vary", false),
            http10: r.value("gzip_http_version", "1.0 or 1.1", one_of("1.1", "1.0")).unwrap_or(false),
            proxied: r.value("gzip_proxied", "off or any", one_of("off", "any")).unwrap_or(false),
        };
        on.then_some(gzip)
    }
}

impl ErrorPage {
    /// The `@name` that it always goes to.
    pub(super) fn named(&self) -> Option<&str> {
        match self.target.0.as_slice() {
            [Piece::Text(name)] if name.starts_with('@') => Some(name),
            _ => None,
        }
    }

    pub(super) fn read_all(r: &mut Reader<'_>) -> Vec<ErrorPage> {
        const MEANT: &str =
            "statuses from 300 to 599 and a path, @name or URL, as 404 /missing.html or 502 503 =200 @later";
        let pages = r.options.all("error_page").iter().map(|line| (line, ErrorPage::parse(line)));
        let (good, bad): (Vec<_>, Vec<_>) = pages.partition(|(_, page)| page.is_some());
        bad.iter().for_each(|(line, _)| r.mistake("error_page", line, MEANT));
        good.into_iter().filter_map(|(_, page)| page).collect()
    }

    fn parse(line: &str) -> Option<ErrorPage> {
        let mut words: Vec<_> = line.split_whitespace().collect();
        let target = words.pop()?;
        let mut status = PageStatus::Same;
        if let Some(given) = words.last().and_then(|word| word.strip_prefix('=')) {
            status = match given {
                "" => PageStatus::Own,
                // 1xx is no answer.
                given => PageStatus::Given(given.parse().ok().filter(|status| (200..=999).contains(status))?),
            };
            words.pop();
        }
        // 499 is sent to nobody.
        let code = |word: &&str| word.parse().ok().filter(|code| (300..=599).contains(code) && *code != 499);
        let codes = words.iter().map(code).collect::<Option<Vec<u16>>>()?;
        let sound = !codes.is_empty() && (target.starts_with(['/', '@', '$']) || target.contains("://"));
        sound.then(|| ErrorPage { codes, status, target: Template::parse(target) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn error_pages_are_read_as_nginx_reads_them() {
        let page = |codes: &[u16], status, target| {
            Some(ErrorPage { codes: codes.to_vec(), status, target: Template::parse(target) })
        };
        for (line, expected) in [
            ("404 /404.html", page(&[404], PageStatus::Same, "/404.html")),
            ("500 502 = @down", page(&[500, 502], PageStatus::Own, "@down")),
            ("403 =200 /empty?a=$uri", page(&[403], PageStatus::Given(200), "/empty?a=$uri")),
            ("404 http://other.test/", page(&[404], PageStatus::Same, "http://other.test/")),
            ("404", None),
            ("/404.html", None),
            ("200 /x", None),
            ("499 /x", None),
            ("404 =1000 /x", None),
            ("404 =100 /x", None),
            ("404 =199 /x", None),
            ("299 /x", None),
            ("600 /x", None),
            ("404 x.html", None),
        ] {
            assert_eq!(ErrorPage::parse(line), expected, "{line}");
        }
    }

    #[test]
    fn the_charset_of_routes_is_a_name_or_off() {
        for (written, name, is_good) in [
            (json!("utf-8"), Some("utf-8"), true),
            (json!("gbk"), Some("gbk"), true),
            (json!("off"), None, true),
            (json!(null), None, true),
            (json!(""), None, false),
            (json!("$charset"), None, false),
            (json!("utf-8\r\nX: y"), None, false),
            (json!(8), None, false),
        ] {
            let config = json!({"nginx_config": {"http": {"charset": written}}});
            let charset = Charset::of_routes(&config);
            assert_eq!(charset.as_ref().map(|charset| &*charset.name), name, "{config}");
            assert_eq!(Charset::mistake_of_routes(&config).is_none(), is_good, "{config}");
        }
        assert!(Charset::of_routes(&json!({})).is_none());
    }

    #[test]
    fn types_are_compared_without_their_parameters() {
        let types = Types(vec!["text/plain".into()]);
        assert!(types.has(b"Text/Plain; charset=utf-8") && types.has(b"text/html") && !types.has(b"text/css"));
        assert!(Types(vec!["*".into()]).has(b"image/png"));
    }
}
