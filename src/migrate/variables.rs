//! Which variables a request has here.

use crate::exchange::{Known, Var, vars};

/// What to do about a name that nothing knows.
pub(super) const ADVICE: &str = "it is absent until something sets it: a function can, by ngx.var.x = …";

/// Whether the gateway, a family (`arg_x`) or APISIX's nginx.conf gives the variable a meaning.
pub(super) fn is_known(name: &str) -> bool {
    Known::number(name).is_some() || vars::is_preset(name) || !matches!(Var::parse(name), Var::Custom(_))
}

/// Names in a text of `$name` and `${name}` that nothing knows. `$1` and `$env://` are no variables.
pub(super) fn unknown_in(text: &str) -> impl Iterator<Item = String> {
    names_in(text).filter(|name| !is_known(name)).map(str::to_owned)
}

fn names_in(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices('$').filter_map(|(at, _)| {
        let rest = &text[at + 1..];
        let name = rest.strip_prefix('{').unwrap_or(rest);
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
        let (name, after) = name.split_at(end);
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        (is_name && !after.starts_with("://")).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_gateway_and_of_families_are_known() {
        for name in ["uri", "arg_x", "http_user_agent", "cookie_a", "upstream_cache_key", "route_id", "upstream_http_x"]
        {
            assert!(is_known(name), "{name}");
        }
        for name in ["geoip_country", "modern_browser", "request_uri2"] {
            assert!(!is_known(name), "{name}");
        }
    }

    #[test]
    fn names_are_found_in_texts() {
        let text = "$uri ${geo_x}y $1 $env://HOME/$ $no_such-$arg_a";
        assert_eq!(unknown_in(text).collect::<Vec<_>>(), ["geo_x", "no_such"]);
        assert_eq!(unknown_in("").count() + unknown_in("$").count() + unknown_in("${").count(), 0);
    }
}
