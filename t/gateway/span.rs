//! apisix.utils.span: a tree that a plugin builds over the phases of a request.

use serde_json::json;

use crate::support::{Gateway, Upstream};

#[test]
fn a_plugin_keeps_a_tree_of_spans_and_logs_it() {
    let up = Upstream::echo();
    let gw = Gateway::start();
    let access = "return function(conf, ctx)
        local span = require('apisix.utils.span')
        local root = span.new('request', span.KIND.SERVER)
        local part = span.new('look-up', nil, root)
        part:set_attributes({ hits = 3, found = true, text = ('x'):rep(5000), odd = {} }):finish()
        span.new('open', span.KIND.CLIENT, root)
        ctx.my_span = root
    end";
    let log = "return function(conf, ctx)
        local core = require('apisix.core')
        local root = ctx.my_span:set_status(2, 'too slow'):finish()
        local part, open = root.children[1], root.children[2]
        core.log.warn('told: ', root.name, ' ', root.kind, ' ', root.status.code, ' ', root.status.message, ' ', #root.children,
            ' ', part.name, ' ', part.kind, ' ', part.parent == root, ' ', part.attributes.hits, ' ', part.attributes.found,
            ' ', #part.attributes.text, ' ', part.attributes.odd, ' ', open.end_time == root.end_time, ' ',
            part.end_time >= part.start_time and part.end_time <= root.end_time, ' ', root:finish() == root)
    end";
    gw.route(
        "1",
        "/get",
        &up,
        json!({"serverless-pre-function": {"phase": "access", "functions": [access]},
            "serverless-post-function": {"phase": "log", "functions": [log]}}),
    );
    assert_eq!(gw.get("/get").status, 200);
    gw.expect_log("told: request 2 2 too slow 2 look-up 1 true 3 true 4096 nil true true true");
}

#[test]
fn a_tree_has_room_for_a_thousand_and_a_span_for_128_attributes() {
    let gw = Gateway::start();
    let script = "return function(conf, ctx)
        local span = require('apisix.utils.span')
        local root = span.new('root')
        for _ = 1, 1200 do span.new('part', 1, root) end
        local other = span.new('other')
        local big, err = span.new('small'):append_child(root)
        for i = 1, 200 do other:set_attributes({ ['name' .. i] = i }) end
        local count = 0
        for _ in pairs(other.attributes) do count = count + 1 end
        return 200, { children = #root.children, dropped = root.dropped, big = big == nil, err = err, count = count,
            twice = { root:append_child(root.children[1]) }, itself = { root:append_child(root) },
            mine = other:append_child(span.new('x')).parent == other,
            bad = { pcall(span.new, nil) }, code = { pcall(other.set_status, other, 9) } }
    end";
    let plugin = json!({"phase": "access", "functions": [script]});
    gw.put("/routes/1", json!({"uri": "/get", "plugins": {"serverless-pre-function": plugin}}));
    let told = gw.get("/get").json();
    assert_eq!((&told["children"], &told["dropped"], &told["count"]), (&json!(999), &json!(201), &json!(128)));
    assert_eq!((&told["big"], &told["mine"]), (&json!(true), &json!(true)));
    assert_eq!(told["err"], "the tree has 1 spans, and no room for more than 1000");
    assert!(told["twice"].to_string().contains("the span has a parent"), "{told}");
    assert!(told["itself"].to_string().contains("a span is no part of itself"), "{told}");
    assert!(told["bad"].to_string().contains("a span has a name"), "{told}");
    assert!(told["code"].to_string().contains("status is 0, 1 or 2"), "{told}");
}
