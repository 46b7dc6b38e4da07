/* channels.c - sessions of SMTP over channels of the native protocol (docs/protocol.md section 7), which come authenticated.
 *
 * A channel is as warm as can be: it is never closed, and one session of SMTP after another goes through it, raw, as the
 * client library has it. Anything but the usual course ends the program: a benchmark has no use for it.
 */
#define _GNU_SOURCE
#include "native.h"
#include "session.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>

static int free_channels[MAX_FDS], free_channel_count;

/* Channels are open before the first session and stay open behind the last one. */
void channels_begin(void)
{
    if (opt.message_bytes > FRAME_ROOM - FRAME_HEAD - 3) {
        fputs("loadgen: a message goes through a channel in one frame of 64 KB at most\n", stderr);
        exit(64);
    }
    for (int i = 0; i < opt.fd_count; i++) {
        session_watch_fd(opt.fds[i], EPOLL_CTL_ADD, 0, NULL);
        free_channels[free_channel_count++] = opt.fds[i];
    }
}

void channel_release(struct session *s, bool good)
{
    if (!good) {
        fprintf(stderr, "loadgen: a channel failed at step %d, frame 0x%02x\n", s->step, s->head[4]);
        exit(1);
    }
    free_channels[free_channel_count++] = s->fd;
}

/* What stands for connect and handshake on a channel. */
static void channel_open(struct session *s)
{
    char from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
    struct in_addr source = next_source();
    struct frame f;
    inet_ntop(AF_INET, &source, from, sizeof from);
    inet_ntop(AF_INET, &opt.target.sin_addr, to, sizeof to);
    frame_begin(&f, F_OPEN);
    frame_array(&f, 2);
    frame_text(&f, from);
    frame_array(&f, 1);
    frame_array(&f, 2);
    frame_text(&f, to);
    frame_uint(&f, ntohs(opt.target.sin_port));
    frame_end(&f);
    ask_octets(s, OPENING, f.octets, f.length, 0);
}

void channel_start(struct session *s, double began)
{
    *s = (struct session){.fd = free_channels[--free_channel_count], .began = began};
    totals.started++;
    totals.active++;
    session_watch(s, EPOLL_CTL_MOD, EPOLLIN);
    channel_open(s);
}

void channel_end(struct session *s)
{
    struct frame f;
    frame_begin(&f, F_END);
    frame_array(&f, 1);
    frame_bool(&f, false);
    frame_end(&f);
    ask_octets(s, ENDING, f.octets, f.length, 0);
}

/* A frame has come whole; what DATA carries was taken before. False: the session is over. */
static bool frame_came(struct session *s)
{
    s->head_octets = 0;
    switch (s->head[4]) {
    case F_DATA: case F_EOF: return true;
    case F_OPENED:
        s->step = GREETING;
        s->replies_due = 1;
        return true;
    default:
        session_finish(s, s->head[4] == F_ENDED && s->step == ENDING);
        return false;
    }
}

void channel_octets(struct session *s, const char *data, size_t length)
{
    while (length) {
        if (s->head_octets < FRAME_HEAD) {
            s->head[s->head_octets++] = (unsigned char)*data++;
            length--;
            if (s->head_octets < FRAME_HEAD)
                continue;
            s->frame_left = frame_length(s->head);
        }
        size_t piece = s->frame_left < length ? s->frame_left : length;
        if (s->head[4] == F_DATA)
            dialogue_octets(s, data, (ssize_t)piece);
        data += piece;
        length -= piece;
        s->frame_left -= piece;
        if (s->frame_left == 0 && !frame_came(s))
            return;
    }
}
