"""`ctl show logins`: who still uses the old one of two secrets, through both doors that know any; never a secret."""

from __future__ import annotations

import json
import uuid

from greenarrow_proxy_client import Limits, Session
from tests.clients import socks5
from tests.e2e.control.test_control import ctl
from tests.program import SECRET, Proxy
from tests.sinks import Raw, greet

NEW = "another-secret-of-more-than-32-characters"


def test_the_number_follows_the_configuration():
    path = f"@greenarrow-test-{uuid.uuid4()}"

    def logins(*words):
        code, out, _ = ctl(path, "--json", "show", "logins", *words)
        assert code == 0
        assert NEW not in out
        assert SECRET not in out
        return [
            (row["instance"], row["secret"], row["latest"], row["logins"]) for row in json.loads(out).get("rows", [])
        ]

    with Proxy(f"control_socket {path}\nlisten_tls no\n") as proxy, Raw(greet) as mx:
        socks5(proxy.socks5, mx.endpoint, user="mta-1").close()
        with Session(proxy.native, SECRET, "mta-2", tls=False) as session:
            session.throttle("127.0.0.9", Limits("yahoo", [(60, 60)])).wait_until_registered(30)
            assert logins() == [("mta-2", "1", True, 1), ("mta-1", "1", True, 1)]
        both = f'control_socket {path}\nlisten_tls no\nauth_shared_secret "{NEW}"\nauth_shared_secret "{SECRET}"\n'
        proxy.hup(both)
        assert logins("secret=2", "latest=yes") == [("mta-2", "2", True, 1), ("mta-1", "2", True, 1)]
        socks5(proxy.socks5, mx.endpoint, user="mta-1", password=NEW).close()
        assert logins("secret=2", "latest=yes") == [("mta-2", "2", True, 1)]
        assert logins("mta-1") == [("mta-1", "1", True, 1), ("mta-1", "2", False, 1)]
        proxy.hup(f'control_socket {path}\nlisten_tls no\nauth_shared_secret "{NEW}"\n')
        assert {row[1] for row in logins("mta-2")} == {"gone"}
