//! Metrics of plugins' own: on the gateway's page beside its own, and on pages of their own.

use std::collections::BTreeSet;

use serde_json::json;

use crate::support::{Gateway, Upstream, get};

fn page(gw: &Gateway) -> String {
    get(&gw.prometheus(), "/apisix/prometheus/metrics").text()
}

/// A plugin that counts what it is told to; `labels` of its counter.
fn counting(labels: &str) -> String {
    format!(
        "local core = require('apisix.core')
        local exporter = require('apisix.plugins.prometheus.exporter')
        local _M = {{ version = 0.1, priority = 1, name = 'counting', schema = {{ type = 'object' }} }}
        local seen, busy, took, none
        function _M.init()
            local prometheus = exporter.get_prometheus()
            seen = prometheus:counter('mine_seen_total', 'requests by worker', {labels})
            busy = prometheus:gauge('mine_busy', 'how busy')
            took = prometheus:histogram('mine_took', 'seconds', {{ 'kind' }})
            none = prometheus:counter('http_status', 'the gateway has one')
        end
        function _M.access(conf, ctx)
            seen:inc(1, {{ ngx.worker.id(), 'a' }})
            busy:set(7)
            busy:inc(-2.5)
            took:observe(0.3, {{ 'slow' }})
            took:observe(0.004, {{ 'quick' }})
            took:observe('x', {{ 'quick' }})
            if ngx.var.arg_wrong then seen:inc(1, {{ 'a' }}) seen:inc(-1, {{ 'a', 'b' }}) end
            if ngx.var.arg_forget then took:del({{ 'slow' }}) busy:reset() end
            return 200, tostring(none)
        end
        return _M"
    )
}

#[test]
fn all_workers_count_on_the_gateways_page() {
    let gw = Gateway::with(json!({"nginx_config": {"worker_processes": 2}}));
    let up = Upstream::echo();
    gw.put("/plugin_sources/counting", json!({"source": counting("{ 'worker', 'of' }")}));
    gw.route("1", "/x", &up, json!({"counting": {}}));
    // As many as it takes until both workers had one.
    let mut asked = 0;
    let workers = crate::support::eventually("both workers count", || {
        assert_eq!(gw.get("/x").text(), "nil");
        asked += 1;
        let page = page(&gw);
        let lines: BTreeSet<_> =
            page.lines().filter(|l| l.starts_with("apisix_mine_seen_total{")).map(str::to_owned).collect();
        (lines.len() == 2).then_some(lines)
    });
    let counts = workers.iter().map(|line| line.rsplit_once(' ').expect("a count").1.parse::<u32>().expect("a number"));
    assert_eq!(counts.sum::<u32>(), asked, "{workers:?}");
    assert!(workers.iter().any(|line| line.contains("{worker=\"1\",of=\"a\"}")), "{workers:?}");
    let text = page(&gw);
    for line in [
        "# HELP apisix_mine_seen_total requests by worker",
        "# TYPE apisix_mine_seen_total counter",
        "apisix_mine_busy 4.5",
        "apisix_mine_took_bucket{kind=\"slow\",le=\"0.2\"} 0",
        &format!("apisix_mine_took_bucket{{kind=\"slow\",le=\"0.3\"}} {asked}"),
        &format!("apisix_mine_took_bucket{{kind=\"quick\",le=\"0.005\"}} {asked}"),
        &format!("apisix_mine_took_count{{kind=\"quick\"}} {asked}"),
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    gw.expect_log("prometheus: metric \"http_status\" is one of the gateway's own");
    gw.expect_log("prometheus: mine_took: the value is no number");
    assert!(text.contains("apisix_nginx_metric_errors_total 0\n"), "{text}");
    gw.get("/x?wrong=1");
    gw.expect_log("prometheus: mine_seen_total: inconsistent labels count, expected 2, got 1");
    gw.expect_log("prometheus: mine_seen_total: the value of a counter does not fall");
    assert!(page(&gw).contains("apisix_nginx_metric_errors_total 2\n"));
    gw.get("/x?forget=1");
    let text = page(&gw);
    assert!(text.contains("mine_took_count{kind=\"quick\"}") && !text.contains("kind=\"slow\""), "{text}");
    assert!(!text.contains("apisix_mine_busy"), "{text}");
    // The next version has other labels.
    gw.put("/plugin_sources/counting", json!({"source": counting("{ 'worker', 'for' }")}));
    gw.get("/x");
    let text = page(&gw);
    assert!(text.contains("for=\"a\"} 1\n") && !text.contains("of=\"a\"}"), "{text}");
}

#[test]
fn a_plugin_may_have_a_page_of_its_own() {
    let gw = Gateway::start();
    let up = Upstream::echo();
    let source = "
        local prometheus = require('prometheus').init('my_dict', { prefix = 'shop_' })
        local sold = prometheus:counter('sold_total', 'things', { 'what' })
        local _M = { version = 0.1, priority = 1, name = 'shop', schema = { type = 'object' } }
        function _M.access(conf, ctx)
            if ngx.var.uri == '/lines' then return 200, prometheus:metric_data() end
            if ngx.var.uri == '/metrics' then prometheus:collect() return ngx.exit(200) end
            sold:inc(2, { ngx.unescape_uri(ngx.var.arg_what) })
            return 200, 'sold'
        end
        return _M";
    gw.put("/plugin_sources/shop", json!({"source": source}));
    gw.put("/routes/1", json!({"uri": "/*", "plugins": {"shop": {}}, "upstream": {"nodes": {up.addr(): 1}}}));
    assert_eq!(gw.get("/buy?what=a%22b").text(), "sold");
    let expected =
        "# HELP shop_sold_total things\n# TYPE shop_sold_total counter\nshop_sold_total{what=\"a\\\"b\"} 2\n";
    let shown = gw.get("/metrics");
    assert_eq!((shown.text().as_str(), shown.header("content-type")), (expected, Some("text/plain; charset=utf-8")));
    let lines: Vec<String> = expected.lines().map(|line| format!("{line}\n")).collect();
    assert_eq!(gw.get("/lines").json(), json!(lines));
    assert!(!page(&gw).contains("sold"));
    // Uploaded functions have no part in it.
    gw.put("/functions/f", json!({"source": "return function() return 200, { pcall(require, 'prometheus') } end"}));
    gw.put("/routes/2", json!({"uri": "/f", "priority": 1, "function_id": "f"}));
    assert_eq!(gw.get("/f").json()[0], false);
}
