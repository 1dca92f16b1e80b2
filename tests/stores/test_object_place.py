"""An object-store prefix keeps the contract of a place, also when the service fails, is slow, or loses its answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import GenericError
from places_contract import CONTENT, MANY, PlaceContract
from s3_server import BUCKET, KEY, SECRET, TOKEN, everything, options

from tensortape.stores.errors import UnsafePlaceError
from tensortape.stores.places import LocalPlace, place_at
from tensortape.stores.places.failures import failure
from tensortape.stores.places.fetched import GAP, MOST, requests
from tensortape.stores.places.object_store import PIECE, ObjectPlace

URL = f"s3://{BUCKET}"


@pytest.fixture
def url(request, tmp_path) -> str:
    """A prefix of the test's own."""
    return f"{URL}/{tmp_path.name}"


@pytest.fixture
def place(s3, url) -> ObjectPlace:
    return ObjectPlace(url, options(s3))


@pytest.fixture
def failing(traffic, url) -> ObjectPlace:
    """The same prefix behind the proxy."""
    return ObjectPlace(url, options(traffic.port))


class TestContract(PlaceContract):
    """Against a real server."""


# Failing requests.

READS: dict[str, tuple[str, Callable[[ObjectPlace], Any], Any]] = {
    "read": ("GET", lambda place: place.read("there"), CONTENT),
    "size": ("HEAD", lambda place: place.size("there"), MANY),
    "names": ("LIST", lambda place: place.names(""), ["there"]),
    "ranges": (
        "GET",
        lambda place: [bytes(part) for part in place.ranges("there", [(3, 5), (9, 2000)])],
        [CONTENT[3:5], CONTENT[9:2000]],
    ),
}


@pytest.mark.parametrize("kind", ["500", "503", "reset", "lost"])
@pytest.mark.parametrize("name", READS)
def test_a_read_that_fails_once_comes_through(failing, traffic, name, kind):
    request, read, expected = READS[name]
    failing.replace("there", [CONTENT])
    traffic.fail(kind, request)
    if (name, kind) == ("names", "reset"):  # obstore does not repeat a list that breaks off
        with pytest.raises(ConnectionError, match="the run: the connection broke off"):
            read(failing)
    assert read(failing) == expected


@pytest.mark.parametrize("kind", ["500", "503", "reset"])
@pytest.mark.parametrize("name", READS)
def test_a_read_that_keeps_failing_raises(failing, traffic, name, kind):
    request, read, _ = READS[name]
    failing.replace("there", [CONTENT])
    traffic.fail(kind, request, times=99)
    with pytest.raises(ConnectionError, match=rf"(there|the run): .*\({URL}/.*\)"):
        read(failing)
    assert traffic.count(request) <= 6


# A conflict (409) is the answer to a condition only.
@pytest.mark.parametrize(("method", "kind"), [("create", "409"), *product(["create", "replace"], ["500", "503", "reset", "lost"])])
def test_a_write_that_fails_once_comes_through(failing, traffic, method, kind):
    """Answers that get lost among them: the object is there already when the request is repeated, and refused because of itself."""
    failing.create("other", [b""])  # the service has been tried
    traffic.fail(kind, "PUT")
    getattr(failing, method)("new", [b"content"])
    assert failing.read("new") == b"content"
    assert traffic.count("PUT", "new") >= 2


@pytest.mark.parametrize("method", ["create", "replace"])
@pytest.mark.parametrize("kind", ["500", "503", "reset"])
def test_a_write_that_keeps_failing_raises_and_leaves_nothing(failing, traffic, method, kind):
    failing.create("other", [b""])
    failing.replace("old", [b"old"])
    traffic.fail(kind, "PUT", times=99)
    for name in ("new", "old") if method == "replace" else ("new",):
        with pytest.raises(ConnectionError, match=rf"{name}: .*\({URL}/.*\)"):
            getattr(failing, method)(name, [b"content"])
    assert (failing.names(""), failing.read("old")) == (["old", "other"], b"old")
    assert traffic.count("PUT", "new") <= 10


def test_a_write_whose_every_answer_gets_lost_is_seen_to_be_there(failing, traffic):
    failing.create("other", [b""])
    traffic.fail("lost", "PUT", times=99)
    failing.create("new", [b"content"])
    with pytest.raises(FileExistsError):
        failing.create("new", [b"another"])


@pytest.mark.parametrize("request_", ["PUT", "GET", "HEAD", "LIST"])
def test_a_service_that_does_not_answer_is_a_timeout(traffic, url, request_):
    place = ObjectPlace(url, options(traffic.port, patience=0.4))
    place.create("there", [CONTENT])
    traffic.fail("stall", request_, times=99)
    ask = {"PUT": lambda: place.replace("new", [b"x"]), **{kind: lambda read=read: read(place) for kind, read, _ in READS.values()}}
    with pytest.raises(TimeoutError, match="the service did not answer in time"):
        ask[request_]()


def test_a_create_without_an_answer_is_tried_again(traffic, url):
    """It may or may not have been heeded; obstore leaves it there."""
    place = ObjectPlace(url, options(traffic.port, patience=0.4))
    place.create("other", [b""])
    traffic.fail("stall", "PUT")
    place.create("new", [b"content"])
    assert place.read("new") == b"content"


def test_a_service_that_is_not_there_is_a_connection_error(url):
    place = ObjectPlace(url, options(9))
    with pytest.raises(ConnectionError, match="a/b: the service cannot be reached"):
        place.read("a/b")


def test_a_bucket_that_is_not_there_is_said_to_be_missing(s3):
    place = ObjectPlace("s3://no-such-bucket/run.zarr", options(s3))
    for ask in (lambda: place.names(""), lambda: place.create("a", [b""])):
        with pytest.raises(FileNotFoundError, match=r"404 NoSuchBucket \(s3://no-such-bucket/run.zarr\)"):
            ask()


UPLOADING = [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId")]


# An upload is gone if the answer to its end got lost.
@pytest.mark.parametrize(
    ("request_", "match", "kind"),
    [("POST", "uploadId", "gone"), *((*step, kind) for step, kind in product(UPLOADING, ["500", "lost", "reset"]))],
)
def test_a_large_object_appears_whole_whatever_fails_once(failing, traffic, request_, match, kind):
    content = CONTENT * (PIECE // MANY + 2)
    failing.replace("large", [b"old"])
    traffic.fail(kind, request_, match)
    failing.replace("large", [content])
    assert failing.read("large") == content


def test_a_large_object_that_cannot_be_finished_leaves_the_old_one(failing, traffic):
    failing.replace("large", [b"old"])
    traffic.fail("500", "PUT", "partNumber=2", times=99)
    with pytest.raises(ConnectionError):
        failing.replace("large", [CONTENT] * (PIECE // MANY + 2))
    assert failing.read("large") == b"old"


def test_a_list_that_comes_in_several_answers_is_read_to_its_end(failing, traffic):
    names = [f"{number:02d}" for number in range(20)]
    failing.each(lambda name: failing.replace(f"many/{name}", [b""]), names)
    traffic.fail("500", "LIST", "continuation-token")
    assert failing.names("many") == names
    assert traffic.count("LIST") > 2
    traffic.fail("500", "LIST", "continuation-token", times=99)
    with pytest.raises(ConnectionError):
        failing.names("many")


# Who may create.


def test_a_service_that_ignores_the_condition_is_refused_before_anything_is_created(failing, traffic, place):
    traffic.drops.add("if-none-match")
    for _ in range(2):
        with pytest.raises(UnsafePlaceError, match=r"does not heed conditional requests.*storage_options=\{'exclusive': True\}"):
            failing.create("commits/1.json", [b"mine"])
    assert place.names("") == []


def test_a_service_that_refuses_the_condition_is_refused(s3, url):
    place = ObjectPlace(url, options(s3, conditional_put="disabled"))
    with pytest.raises(UnsafePlaceError):
        place.create("a", [b"mine"])


def test_the_only_writer_needs_no_conditions(traffic, url):
    traffic.drops.add("if-none-match")
    alone = ObjectPlace(url, options(traffic.port, exclusive=True))
    alone.create("a", [b"mine"])
    with pytest.raises(FileExistsError):
        alone.create("a", [b"again"])
    assert alone.read("a") == b"mine"


def test_the_service_is_tried_once_by_each_writer_and_what_the_first_leaves_serves_the_others(traffic, url):
    for number in range(3):
        place = ObjectPlace(url, options(traffic.port))
        traffic.clear()
        place.create(f"{number}/a", [b""])
        place.create(f"{number}/b", [b""])
        assert traffic.count("PUT", ".create.partial") == (2 if number == 0 else 1)
    assert place.names("") == ["0", "1", "2"]


# Fetching.


def test_spans_near_to_one_another_come_in_one_request_and_large_ones_in_several():
    assert list(requests([(900, 1000), (0, 10), (10, 20)])) == [[(0, 10), (10, 20), (900, 1000)]]
    assert list(requests([(0, 10), (10 + GAP, 20 + GAP)])) == [[(0, 10)], [(10 + GAP, 20 + GAP)]]
    assert list(requests([(5, 2 * MOST + 6)])) == [[(5, MOST + 5)], [(MOST + 5, 2 * MOST + 5)], [(2 * MOST + 5, 2 * MOST + 6)]]
    assert list(requests([])) == []


def test_bytes_between_spans_are_left_alone(place):
    """They may have been checked before, and be in use: what comes by the way is not."""
    place.replace("a", [CONTENT])
    view = place.view("a", expected=MANY, stays=True)
    view.load([(0, 100), (200, 300)])
    assert not view.content[100:200].any()
    assert (view.held, place.fetched) == (200, 200)


def test_an_object_that_became_shorter_is_noticed(place):
    place.replace("a", [CONTENT])
    view = place.view("a", expected=MANY, stays=True)
    place.replace("a", [CONTENT[:1000]])
    with pytest.raises(OSError, match="a: the object is shorter"):
        view.load([(500, 2000)])
    with pytest.raises(OSError, match="a: the service answered 416 InvalidRange"):
        view.load([(2000, 3000)])


# Which place.


def test_a_place_is_chosen_by_what_it_is_called(tmp_path, monkeypatch, s3):
    monkeypatch.chdir(tmp_path)
    assert isinstance(place_at("run.zarr"), LocalPlace)
    assert place_at(Path("run.zarr")).root == tmp_path / "run.zarr"
    place = place_at(f"{URL}/a b/run@home.zarr/".replace("@", "-"), storage_options=options(s3))
    assert (repr(place), place.root) == (f"<ObjectPlace {URL}/a b/run-home.zarr>", f"{URL}/a b/run-home.zarr")


@pytest.mark.parametrize(
    "wrong",
    [
        "s3://user:canary@bucket/run.zarr",
        "s3://canary@bucket/run.zarr",
        "s3://user:can/ary@bucket/run.zarr",
        "s3://bucket/run.zarr?X-Amz-Signature=canary",
        "s3://bucket/run.zarr#canary",
        "s3://bucket",
        "s3://bucket/",
        "s3:///canary",
        "s3://bucket/../canary",
        "s3://bucket//canary",
        "https://user:canary@host/run.zarr",
        "ftp://canary",
    ],
)
def test_other_urls_are_refused_and_not_repeated(wrong):
    with pytest.raises(ValueError, match="s3://bucket/path/of/the/run, without user, password") as raised:
        place_at(wrong)
    shown = everything(raised.value)
    assert "canary" not in shown.replace("can/ary", "canary")


def test_a_url_in_a_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be given as text"):
        place_at(Path("s3://bucket/run.zarr"))


def test_options_are_not_for_folders(tmp_path):
    with pytest.raises(ValueError, match="not for the folder") as raised:
        place_at(tmp_path, storage_options={"secret_access_key": SECRET})
    assert SECRET not in everything(raised.value)


@pytest.mark.parametrize(
    "given", [{"nokey": SECRET}, {"skip_signature": SECRET}, {"endpoint": 3}, {"client_options": {"timeout": SECRET}}]
)
def test_options_that_obstore_does_not_take_are_named_without_their_values(given):
    with pytest.raises(ValueError, match=f"refuses storage_options '{next(iter(given))}'") as raised:
        place_at(f"{URL}/run.zarr", storage_options=given)
    assert SECRET not in everything(raised.value)


def test_without_obstore_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    monkeypatch.delitem(__import__("sys").modules, "tensortape.stores.places.object_store")
    with pytest.raises(ImportError, match=re.escape("pip install 'tensortape[s3]'")):
        place_at(f"{URL}/run.zarr")


# Secrets.


@pytest.mark.parametrize("kind", ["500", "403", "409", "reset", "lost"])
def test_no_error_shows_a_secret(traffic, url, kind):
    """Not the endpoint's password, which obstore shows, nor what the service repeats of a request."""
    place = ObjectPlace(url, options(traffic.port, endpoint=f"http://canary-user:canary-password@127.0.0.1:{traffic.port}"))
    for request in ("PUT", "GET", "HEAD", "LIST"):
        traffic.fail(kind, request, times=99)
    for ask in (
        lambda: place.create("a", [b""]),
        lambda: place.replace("a", [b""]),
        *(lambda r=read: r(place) for _, read, _ in READS.values()),
    ):
        with pytest.raises(OSError, match=URL) as raised:
            ask()
        shown = everything(raised.value)
        assert not [secret for secret in (KEY, SECRET, TOKEN, "canary-user", "canary-password") if secret in shown]
    assert "canary" not in repr(place)


def test_missing_credentials_are_said_to_be_missing():
    """Where there are none, obstore asks the address at which machines of the cloud find theirs."""
    text = (
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 5s - HTTP error: error sending request"
    )
    error = failure(GenericError(text), "a/b", f"{URL}/run.zarr")
    assert isinstance(error, PermissionError)
    assert str(error).startswith("a/b: there are no credentials; set AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("status code: 403 Forbidden: <Error><Code>AccessDenied</Code>", OSError, "the service answered 403 AccessDenied"),
        ("status code: 429 Too Many", ConnectionError, "the service answered 429"),
        ("status code: 501 Not Implemented", OSError, "the service answered 501"),
        ("Received redirect without LOCATION", ConnectionError, "is the region of the bucket right?"),
    ],
)
def test_what_the_service_said_is_passed_on(text, kind, reason):
    error = failure(GenericError(f"Generic S3 error: {text}"), "a", f"{URL}/run.zarr")
    assert isinstance(error, kind)
    assert reason in str(error)
