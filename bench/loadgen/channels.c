/* channels.c - sessions of SMTP over channels of the native protocol (docs/protocol.md section 7), which come authenticated.
 *
 * A channel is as warm as can be: it is never closed, and one session of SMTP after another goes through it. As in the
 * client library a session is over with its END; ENDED is not waited for, and an OPEN that is due goes in one piece with
 * the END before it. Anything but the usual course ends the program: a benchmark has no use for it.
 */
#define _GNU_SOURCE
#include "native.h"
#include "session.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int channels_taken;

/* Channels are open before the first session and stay open behind the last one. */
void channels_begin(void)
{
    if (opt.message_bytes > FRAME_ROOM - FRAME_HEAD - 3) {
        fputs("loadgen: a message goes through a channel in one frame of 64 KB at most\n", stderr);
        exit(64);
    }
}

static void give_up(struct session *s)
{
    fprintf(stderr, "loadgen: a channel failed at step %d, frame 0x%02x\n", s->step, s->channel.head[4]);
    exit(1);
}

/* What stands for connect and handshake on a channel. */
static void open_frame(struct frame *f)
{
    char from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
    struct in_addr source = next_source();
    inet_ntop(AF_INET, &source, from, sizeof from);
    inet_ntop(AF_INET, &opt.target.sin_addr, to, sizeof to);
    frame_begin(f, F_OPEN);
    frame_array(f, opt.brought_up ? 3 : 2);
    frame_text(f, from);
    frame_array(f, 1);
    frame_array(f, 2);
    frame_text(f, to);
    frame_uint(f, ntohs(opt.target.sin_port));
    if (opt.brought_up)
        frame_text(f, EHLO_NAME);
    frame_end(f);
}

static void end_frame(struct frame *f)
{
    frame_begin(f, F_END);
    frame_array(f, opt.brought_up ? 3 : 1);
    frame_bool(f, false);
    if (opt.brought_up) {
        frame_uint(f, (uint64_t)opt.messages);
        frame_bool(f, true);
    }
    frame_end(f);
}

void channel_start(struct session *s, double began)
{
    struct channel channel = s->channel;
    struct frame flight = {0}, request;
    *s = (struct session){.fd = channel.taken ? s->fd : opt.fds[channels_taken++], .channel = channel, .began = began};
    totals.started++;
    totals.active++;
    if (!channel.taken)
        session_watch(s, EPOLL_CTL_ADD, EPOLLIN);
    s->channel.taken = true;
    if (channel.end_unsaid)
        end_frame(&flight);
    s->channel.end_unsaid = false;
    open_frame(&request);
    memcpy(flight.octets + flight.length, request.octets, request.length);
    ask_octets(s, OPENING, flight.octets, flight.length + request.length, 0);
}

void channel_end(struct session *s, bool good)
{
    if (!good)
        give_up(s);
    s->channel.end_unsaid = s->channel.ended_due = true;
    totals.leaving++;
}

void channel_rest(struct session *s)
{
    struct frame f;
    if (!s->channel.end_unsaid)
        return;
    s->channel.end_unsaid = false;
    end_frame(&f);
    session_put(s, (const char *)f.octets, f.length);
}

/* A frame has come whole; what DATA carries was taken before. */
static void frame_came(struct session *s)
{
    struct channel *channel = &s->channel;
    channel->head_octets = 0;
    if (channel->head[4] == F_DATA || channel->head[4] == F_EOF)
        return;
    if (channel->head[4] == F_ENDED && channel->ended_due) {
        channel->ended_due = false;
        totals.leaving--;
    } else if (channel->head[4] == F_OPENED && s->step == OPENING && !channel->ended_due) {
        s->step = GREETING;
        s->replies_due = 1;
        if (opt.brought_up) {
            sample_add(&totals.setup_us, (now() - s->began) * 1e6);
            dialogue_is_up(s);
        }
    } else {
        give_up(s);
    }
}

void channel_octets(struct session *s, const char *data, size_t length)
{
    struct channel *channel = &s->channel;
    while (length) {
        if (channel->head_octets < FRAME_HEAD) {
            channel->head[channel->head_octets++] = (unsigned char)*data++;
            length--;
            if (channel->head_octets < FRAME_HEAD)
                continue;
            channel->frame_left = frame_length(channel->head);
        }
        size_t piece = channel->frame_left < length ? channel->frame_left : length;
        if (channel->head[4] == F_DATA && !channel->ended_due)
            dialogue_octets(s, data, (ssize_t)piece);
        data += piece;
        length -= piece;
        channel->frame_left -= piece;
        if (channel->frame_left == 0)
            frame_came(s);
    }
}
