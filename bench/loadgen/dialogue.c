/* dialogue.c - a client's side of SMTP: a chain of questions and answers, so it is written as one, in `advance`. */
#define _GNU_SOURCE
#include "native.h"
#include "session.h"
#include "tls.h"

#include <stdlib.h>
#include <string.h>

#define MAIL_LINE "MAIL FROM:<bounce-1234567@sender.example.com> BODY=8BITMIME\r\n"
#define RCPT_LINE "RCPT TO:<recipient@example.net>\r\n"
#define DATA_LINE "DATA\r\n"

static char *message;        /* message_bytes of text and the final dot; on a channel, its frame's header stands before */

void dialogue_init(void)
{
    static const char line[] = "The quick brown fox jumps over the lazy dog, again and again and once more.\r\n";
    static const char dot[] = ".\r\n";
    message = malloc(FRAME_HEAD + opt.message_bytes + sizeof line + sizeof dot);
    if (!message)
        die("memory");
    message += FRAME_HEAD;
    size_t length = 0;
    for (; length < opt.message_bytes; length += sizeof line - 1)
        memcpy(message + length, line, sizeof line - 1);
    opt.message_bytes = length;
    memcpy(message + length, dot, sizeof dot - 1);
    frame_head((unsigned char *)message - FRAME_HEAD, F_DATA, length + sizeof dot - 1);
}

static void next_message(struct session *s)
{
    if (opt.pipelining)
        ask(s, DATA, MAIL_LINE RCPT_LINE DATA_LINE, 3);
    else
        ask(s, MAIL, MAIL_LINE, 1);
}

static void send_message(struct session *s)
{
    size_t head = opt.handshake == HS_NATIVE ? FRAME_HEAD : 0;
    ask_octets(s, BODY, message - head, head + opt.message_bytes + 3, 1);
}

static void message_accepted(struct session *s)
{
    totals.messages++;
    if (++s->messages_sent < opt.messages)
        ask(s, RSET, "RSET\r\n", 1);
    else if (opt.brought_up)
        session_finish(s, true);
    else
        ask(s, QUIT, "QUIT\r\n", 1);
}

static void say_ehlo(struct session *s)
{
    ask(s, EHLO, "EHLO " EHLO_NAME "\r\n", 1);
}

/* A flight of the handshake, or the last one: then the dialogue begins anew (RFC 3207 section 4.2). */
void dialogue_shake(struct session *s)
{
    s->step = SHAKING;
    enum shaking state = tls_shake(s->tls);
    if (state == TLS_FAILED)
        session_finish(s, false);
    else if (state == TLS_DONE)
        say_ehlo(s);
}

void dialogue_is_up(struct session *s)
{
    totals.ready++;
    if (session_goal == GOAL_PARK)
        s->step = PARKED;
    else
        next_message(s);
}

/* All replies to the last question are in. */
static void advance(struct session *s)
{
    if (s->code != (s->step == DATA ? '3' : '2')) {
        session_finish(s, false);
        return;
    }
    switch (s->step) {
    case GREETING:
        sample_add(&totals.setup_us, (now() - s->began) * 1e6);
        say_ehlo(s);
        break;
    case EHLO:
        if (opt.starttls && !s->tls) {
            ask(s, STARTTLS, "STARTTLS\r\n", 1);
            break;
        }
        dialogue_is_up(s);
        break;
    case STARTTLS:
        s->tls = tls_new(s->fd);
        dialogue_shake(s);
        break;
    case MAIL: ask(s, RCPT, RCPT_LINE, 1); break;
    case RCPT: ask(s, DATA, DATA_LINE, 1); break;
    case DATA: send_message(s); break;
    case BODY: message_accepted(s); break;
    case RSET: next_message(s); break;
    case QUIT: session_finish(s, true); break;
    case NOOP:
        s->step = PARKED;
        totals.round_trips++;
        sample_add(&totals.round_trip_us, (now() - s->asked) * 1e6);
        if (on_answer)
            on_answer(s);
        break;
    default: break;  /* BULK's own "250": nothing to do */
    }
}

/* Counts whole replies; stops early when the session ended or began anew meanwhile. */
void dialogue_octets(struct session *s, const char *data, ssize_t length)
{
    for (ssize_t i = 0; i < length; i++) {
        if (s->column == 0)
            s->code = data[i];
        else if (s->column == 3)
            s->final_line = data[i] == ' ';
        s->column++;
        if (data[i] != '\n')
            continue;
        s->column = 0;
        if (s->final_line && s->replies_due > 0 && --s->replies_due == 0) {
            advance(s);
            if (s->step == FREE || s->step == CONNECTING || s->step == OPENING)
                return;
        }
    }
}
