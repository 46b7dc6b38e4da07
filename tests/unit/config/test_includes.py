"""`include`: several files as one configuration, and each mistake with the file that it stands in."""

import fnmatch
import posixpath

import pytest

from proxy.config import load as config
from proxy.config.includes import DEEPEST, LONGEST, MOST_FILES, beside
from proxy.errors import ConfigError

BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"


def load(files, main="/etc/proxy.conf"):
    def read_file(path):
        if posixpath.normpath(path) not in files:
            raise FileNotFoundError(2, "No such file or directory")
        return files[posixpath.normpath(path)]

    def find(pattern):
        return sorted(fnmatch.filter(files, pattern))

    return config.load([f"--config-filename={main}"], {}, read_file, find=find)


def mistakes(files):
    with pytest.raises(ConfigError) as caught:
        load(files)
    return str(caught.value).split("\n")


def block(name, line="max_concurrent_connections 1"):
    return f"throttle {name} {{\n    {line}\n}}\n"


def test_what_is_included_stands_in_the_place_of_the_line():
    loaded = load(
        {
            "/etc/proxy.conf": BASE + block("a") + "include more.conf\n" + block("z") + "allow_from 10.0.0.3\n",
            "/etc/more.conf": "allow_from 10.0.0.2\n" + block("m") + "include deep/n.conf\n",
            "/etc/deep/n.conf": block("n"),
        }
    )
    assert [each.name for each in loaded.settings.throttle] == ["a", "m", "n", "z"]
    assert [str(network.network_address) for network in loaded.settings.allow_from] == [
        "127.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
    ]
    assert loaded.files == ("/etc/proxy.conf", "/etc/more.conf", "/etc/deep/n.conf")
    assert loaded.settings.config_filename == "/etc/proxy.conf"
    assert loaded.origins.place("throttle", "m")[1:] == ("/etc/more.conf", 2)


def test_names_are_relative_to_the_file_that_includes():
    assert beside("b.conf", "/etc/a.conf") == "/etc/b.conf"
    assert beside("./b.conf", "/etc/a.conf") == "/etc/b.conf"
    assert beside("d/b.conf", "a.conf") == "d/b.conf"
    assert beside("/b.conf", "/etc/a.conf") == "/b.conf"


def test_a_pattern_takes_files_in_order_and_may_stand_for_none():
    files = {
        "/etc/proxy.conf": BASE + 'include "throttles/*.conf", none/*.conf\n',
        "/etc/throttles/b.conf": block("b"),
        "/etc/throttles/a.conf": block("a"),
        "/etc/throttles/a.txt": "no configuration",
    }
    assert [each.name for each in load(files).settings.throttle] == ["a", "b"]


def test_mistakes_have_the_right_file_and_line():
    told = mistakes(
        {
            "/etc/proxy.conf": BASE + "include a.conf, b.conf\nidle_timeout 5\n",
            "/etc/a.conf": "# a comment\nlog_verbose maybe\n" + block("x", "wait 1"),
            "/etc/b.conf": "}\n",
        }
    )
    assert sorted(line.split(": ")[0] for line in told) == [
        "/etc/a.conf:2",
        "/etc/a.conf:4",
        "/etc/b.conf:1",
        "/etc/proxy.conf:5",
    ]


def test_what_is_given_twice_in_two_files_names_both():
    files = {
        "/etc/proxy.conf": BASE + "log_verbose yes\n" + block("a") + "include a.conf\n",
        "/etc/a.conf": "log_verbose no\n" + block("a"),
    }
    assert mistakes(files) == [
        "/etc/a.conf:1: log_verbose: given twice, in /etc/proxy.conf line 4 and in line 1",
        '/etc/a.conf:2: throttle "a": given twice, in /etc/proxy.conf line 5 and in line 2',
    ]


def test_a_file_that_is_not_there_is_told_alone_where_it_is_named():
    files = {"/etc/proxy.conf": "idle_timeout 5\ninclude a.conf\n"}
    assert mistakes(files) == ["/etc/proxy.conf:2: include: /etc/a.conf: No such file or directory"]


def test_circles_are_refused():
    assert mistakes({"/etc/proxy.conf": BASE + "include proxy.conf\n"}) == [
        "/etc/proxy.conf:4: include: /etc/proxy.conf: it includes itself"
    ]
    files = {"/etc/proxy.conf": BASE + "include a.conf\n", "/etc/a.conf": "\ninclude proxy.conf\n"}
    assert mistakes(files) == ["/etc/a.conf:2: include: /etc/proxy.conf: it includes itself, by /etc/a.conf"]


def test_a_circle_that_no_name_shows_has_an_end():
    """A link `d` to its own folder: each name is another one."""
    with pytest.raises(ConfigError, match=f"more than {DEEPEST} deep"):
        config.load(["--config-filename=/x.conf"], {}, lambda path: BASE + "include d/x.conf\n")


def test_numbers_and_sizes_are_bounded():
    names = [f"{n}.conf" for n in range(MOST_FILES + 5)]
    files = {"/etc/proxy.conf": BASE + f"include {', '.join(names)}\n"} | {f"/etc/{name}": "" for name in names}
    assert f"more than {MOST_FILES} files" in mistakes(files)[0]
    files = {"/etc/proxy.conf": BASE + "include " + ", ".join(["a.conf"] * 9), "/etc/a.conf": "#" * (LONGEST // 4)}
    assert f"longer than {LONGEST} characters" in mistakes(files)[0]


def test_it_stands_outside_of_blocks_and_has_a_name():
    assert mistakes({"/etc/proxy.conf": BASE + block("a", "include a.conf")}) == [
        '/etc/proxy.conf:5: throttle "a": include: stands outside of blocks (is a line `}` missing above?)'
    ]
    assert mistakes({"/etc/proxy.conf": BASE + "include\n"}) == ["/etc/proxy.conf:4: include: a value is missing"]
