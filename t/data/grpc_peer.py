"""A gRPC server and a client of it, by grpcio. Messages are bytes as they are, so that nothing is generated.

    grpc_peer.py serve [KEY CERT CA]      prints its port; with files it speaks TLS and wants a certificate of that CA
    grpc_peer.py ask TARGET [CA NAME]     makes every kind of call; ends with 0 where all went as they should
"""

import queue
import sys
import threading
from concurrent import futures

import grpc

# Calls at once on a connection: fewer than a test makes.
STREAMS = 4
CALLS = 60
# What a test waits for at most, in seconds.
PATIENCE = 20


class Service:
    """Methods by name: the kind of each, and what it does."""

    def __init__(self):
        self.given_up = threading.Semaphore(0)

    def unary(self, request, context):
        context.send_initial_metadata((("x-head", dict(context.invocation_metadata()).get("x-ask", "")),))
        context.set_trailing_metadata((("x-tail", "end"), ("x-raw-bin", b"\x00\xff")))
        return b"got " + request

    def down(self, request, context):
        for n in range(int(request)):
            yield b"%d" % n

    def up(self, requests, context):
        return b"%d" % sum(len(request) for request in requests)

    def both(self, requests, context):
        for request in requests:
            yield request.upper()

    def fail(self, request, context):
        context.set_trailing_metadata((("x-why", "because"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so: 100 % \u00e4")

    def fail_late(self, request, context):
        yield b"first"
        context.abort(grpc.StatusCode.DATA_LOSS, "and then")

    def slow(self, request, context):
        over = threading.Event()
        context.add_callback(over.set)
        over.wait(PATIENCE)
        self.given_up.release()
        return b"too late"

    def noticed(self, request, context):
        """Whether a call was given up."""
        return b"yes" if self.given_up.acquire(timeout=PATIENCE) else b"no"

    def left(self, request, context):
        return b"%d" % round(context.time_remaining())

    def who(self, request, context):
        return b",".join(context.auth_context().get("x509_common_name", []))

    def handlers(self):
        kinds = {
            "unary_unary": ["unary", "fail", "slow", "noticed", "left", "who"],
            "unary_stream": ["down", "fail_late"],
            "stream_unary": ["up"],
            "stream_stream": ["both"],
        }
        return {
            name: getattr(grpc, kind + "_rpc_method_handler")(getattr(self, name))
            for kind, names in kinds.items()
            for name in names
        }


def serve(tls):
    server = grpc.server(
        futures.ThreadPoolExecutor(CALLS), options=[("grpc.max_concurrent_streams", STREAMS), ("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", Service().handlers()),))
    if tls:
        key, cert, ca = (open(path, "rb").read() for path in tls)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)], ca, True))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


def channel_to(target, tls):
    if not tls:
        return grpc.insecure_channel(target)
    ca, name = tls
    credentials = grpc.ssl_channel_credentials(open(ca, "rb").read())
    return grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", name)])


def failure(call):
    try:
        result = call()
    except grpc.RpcError as e:
        return e
    raise AssertionError(f"answered {result!r}")


def same(found, wanted):
    assert found == wanted, f"{found!r} is not {wanted!r}"


def ask(target, tls):
    channel = channel_to(target, tls)
    unary = lambda name: channel.unary_unary("/t.T/" + name)

    response, call = unary("unary").with_call(b"x" * (1 << 20), timeout=PATIENCE, metadata=(("x-ask", "hello"),))
    same((len(response), response[:5]), (4 + (1 << 20), b"got x"))
    same(dict(call.initial_metadata())["x-head"], "hello")
    tail = dict(call.trailing_metadata())
    same((tail["x-tail"], tail["x-raw-bin"]), ("end", b"\x00\xff"))
    same(unary("unary")(b""), b"got ")

    # More at once than a connection of the server takes.
    calls = [unary("unary").future(b"%d" % n, timeout=PATIENCE) for n in range(CALLS)]
    same([call.result() for call in calls], [b"got %d" % n for n in range(CALLS)])

    same(b"".join(channel.unary_stream("/t.T/down")(b"1000", timeout=PATIENCE)), b"".join(b"%d" % n for n in range(1000)))
    pieces = (b"y" * 1000 for _ in range(1000))
    same(channel.stream_unary("/t.T/up")(pieces, timeout=PATIENCE), b"1000000")

    # Each word only when the one before has come back.
    words = queue.Queue()
    answers = channel.stream_stream("/t.T/both")(iter(words.get, None), timeout=PATIENCE)
    for word in (b"a", b"bc", b"def"):
        words.put(word)
        same(next(answers), word.upper())
    words.put(None)
    same(list(answers), [])
    same(answers.code(), grpc.StatusCode.OK)

    e = failure(lambda: unary("fail")(b"", timeout=PATIENCE))
    same((e.code(), e.details()), (grpc.StatusCode.FAILED_PRECONDITION, "not so: 100 % \u00e4"))
    same(dict(e.trailing_metadata())["x-why"], "because")
    late = channel.unary_stream("/t.T/fail_late")(b"", timeout=PATIENCE)
    same(next(late), b"first")
    e = failure(lambda: next(late))
    same((e.code(), e.details()), (grpc.StatusCode.DATA_LOSS, "and then"))
    same(failure(lambda: unary("nothing")(b"")).code(), grpc.StatusCode.UNIMPLEMENTED)

    # The server knows the deadline, and that the client has given up.
    assert 30 <= int(unary("left")(b"", timeout=60)) <= 60
    same(failure(lambda: unary("slow")(b"", timeout=0.3)).code(), grpc.StatusCode.DEADLINE_EXCEEDED)
    same(unary("noticed")(b""), b"yes")

    same(failure(lambda: channel.unary_unary("/t.Dead/unary")(b"")).code(), grpc.StatusCode.UNAVAILABLE)
    same(failure(lambda: channel.unary_unary("/t.Slow/slow")(b"")).code(), grpc.StatusCode.UNAVAILABLE)
    print(unary("who")(b"").decode())


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    serve(rest) if command == "serve" else ask(rest[0], rest[1:])
