"""Where values stand: found without reading the texts again and again."""

from proxy.config.origins import Given, Origins
from proxy.config.values import NETWORK, Kind, parse_endpoint

FALLBACK = Given("", "f")


def test_a_value_is_found_in_its_canonical_form_the_last_time_it_stands():
    given = {"allow_from": [Given("::0001", "f", 1), Given("10.0.0.0-10.0.0.2", "f", 2), Given("::1", "f", 3)]}
    origins = Origins(given, {"allow_from": NETWORK}, FALLBACK)
    (one,) = NETWORK.values("::1")
    assert origins.place("allow_from", one).line == 3
    assert [origins.place("allow_from", network).line for network in NETWORK.values("10.0.0.0-10.0.0.2")] == [2, 2]


def test_what_is_not_found_is_somewhere_all_the_same():
    origins = Origins({"a": [Given("x", "f", 1), Given("y", "f", 2)]}, {}, FALLBACK)
    assert origins.place("a", "x").line == 1
    assert origins.place("a", "other").line == 2
    assert origins.place("a").line == 2
    assert origins.place("b", "x") == FALLBACK


def test_a_broken_value_hides_no_other():
    origins = Origins({"a": [Given("nonsense", "f", 1), Given("::1", "f", 2)]}, {"a": NETWORK}, FALLBACK)
    assert origins.place("a", NETWORK.values("::1")[0]).line == 2


def test_each_text_is_read_once_however_many_are_looked_for():
    reads = []

    def parse(text):
        reads.append(text)
        return parse_endpoint(text)

    texts = [f"127.0.0.1:{port}" for port in range(1000)]
    kinds = {"listen": Kind("endpoint", parse, "")}
    origins = Origins({"listen": [Given(text, "f", line) for line, text in enumerate(texts, 1)]}, kinds, FALLBACK)
    assert reads == []
    for line, text in enumerate(texts, 1):
        assert origins.place("listen", parse_endpoint(text)).line == line
    assert reads == texts
