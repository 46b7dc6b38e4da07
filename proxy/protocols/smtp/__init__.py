"""SMTP (RFC 5321) as far as a proxy has to understand it.

Sans-IO like its parent. `dialogue` speaks it as a client does: greeting, EHLO, STARTTLS, RSET, QUIT. `tracker` watches
a dialogue that passes by and says whether the connection is fit for the next user. Message content is never looked at,
but for its end.

`mediator` takes part in one; `states`, `course`, `commands` and `answers` are its parts.

Read `dialogue` for replies and commands, then `tracker`, then `mediator`.
"""
