//! Lists: filters first, then pages.

use serde_json::Value;

use super::http::{Answer, Call, parse_query};
use crate::model::Kind;

/// What `page_size` may be.
const PAGE_SIZES: std::ops::RangeInclusive<usize> = 10..=500;

/// One object as the API shows it.
pub(super) struct Shown {
    pub key: String,
    pub value: Value,
    pub created: i64,
    pub modified: i64,
}

/// The page that is asked for, and how many items the filters leave on all pages.
pub(super) fn page_of(kind: Kind, call: &Call, mut items: Vec<Shown>) -> Result<(Vec<Shown>, usize), Answer> {
    let size = call.arg("page_size").and_then(|text| text.parse::<i64>().ok());
    if size.is_some_and(|n| !usize::try_from(n).is_ok_and(|n| PAGE_SIZES.contains(&n))) {
        let text = format!("page_size must be between {} and {}", PAGE_SIZES.start(), PAGE_SIZES.end());
        return Err(Answer::text(400, text));
    }
    items.retain(|item| passes(kind, call, &item.value));
    items.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.key.cmp(&b.key)));
    let total = items.len();
    Ok((page(call, items), total))
}

fn page(call: &Call, items: Vec<Shown>) -> Vec<Shown> {
    let number = |name: &str| call.arg(name).and_then(|text| text.parse::<i64>().ok());
    let (page, size) = (number("page"), number("page_size"));
    if page.is_none() && size.is_none() {
        return items;
    }
    let size =
        size.map_or(*PAGE_SIZES.start(), |n| n.clamp(*PAGE_SIZES.start() as i64, *PAGE_SIZES.end() as i64) as usize);
    let skip = usize::try_from(page.unwrap_or(1).max(1) - 1).unwrap_or(usize::MAX).saturating_mul(size);
    items.into_iter().skip(skip).take(size).collect()
}

fn passes(kind: Kind, call: &Call, value: &Value) -> bool {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let by_name = call.arg("name").is_none_or(|name| text("name").is_some_and(|own| own.contains(name)));
    let by_label = call.arg("label").is_none_or(|label| {
        let labels = value.get("labels").and_then(Value::as_object);
        labels.is_some_and(|labels| labels.contains_key(label))
    });
    let by_uri = call.arg("uri").is_none_or(|uri| {
        let many = value.get("uris").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        kind != Kind::Route || text("uri").into_iter().chain(many).any(|own| own.contains(uri))
    });
    by_name && by_label && by_uri && call.arg("filter").is_none_or(|filter| by_reference(kind, filter, value))
}

/// `filter=service_id%3D1%26upstream_id%3D2`.
fn by_reference(kind: Kind, filter: &str, value: &Value) -> bool {
    if !matches!(kind, Kind::Route | Kind::StreamRoute) {
        return true;
    }
    parse_query(filter).iter().filter(|(name, _)| matches!(name.as_str(), "service_id" | "upstream_id")).all(
        |(name, wanted)| match value.get(name) {
            Some(Value::String(id)) => id == wanted,
            Some(Value::Number(id)) => id.to_string() == *wanted,
            _ => false,
        },
    )
}
