//! Which variables a request has here.

use crate::exchange::{Known, Var, vars};

/// What to do about a name that nothing knows.
pub(super) const ADVICE: &str = "it is absent until something sets it: a function can, by ngx.var.x = …";

/// What is no variable of a request, and one of `ctx.var` and of the log formats of plugins.
const OF_PLUGINS: &str = "resp_body";

/// Whether the gateway, a family (`arg_x`) or APISIX's nginx.conf gives the variable a meaning.
pub(super) fn is_known(name: &str) -> bool {
    name == OF_PLUGINS
        || Known::number(name).is_some()
        || vars::is_preset(name)
        || !matches!(Var::parse(name), Var::Custom(_))
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
        let of_families = ["arg_x", "cookie_a", "http_user_agent", "upstream_http_x"];
        for name in of_families.into_iter().chain(["uri", "upstream_cache_key", "route_id", "resp_body"]) {
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
