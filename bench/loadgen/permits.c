/* permits.c - clients that ask for permits: each for `--messages` of them, and for the next when it has them all.
 *
 * Their sessions come authenticated, with a path 0 that is registered, as `--fds`, and `--incarnations` in the same
 * order. They are kept alive as docs/protocol.md wants it: a PING each second, and an answer to each of the proxy's.
 */
#define _GNU_SOURCE
#include "loadgen.h"
#include "native.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

static const double WARM_UP = 0.5;

struct member {
    int fd;
    uint32_t incarnation;
    uint32_t granted;            /* all there were, as DEMAND tells them */
    long waiting;                /* permits of the last DEMAND that have not come */
    double asked;
    unsigned char *in;
    size_t have;                 /* octets of frames that are not whole */
};

static struct member *members;
static int epoll_fd;
static long granted;

static void begin_record(struct frame *f, enum frame_type type, unsigned fields, const struct member *m)
{
    frame_begin(f, type);
    frame_array(f, fields);
    frame_uint(f, m->incarnation);
}

static void send_frame(const struct member *m, struct frame *f)
{
    frame_end(f);
    if (send(m->fd, f->octets, f->length, MSG_NOSIGNAL) != (ssize_t)f->length)
        die("a session takes no frame");
}

/* Microseconds of the clock that permits are told in. */
static uint64_t own_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void ping(const struct member *m)
{
    struct frame f;
    begin_record(&f, F_PING, 2, m);
    frame_uint(&f, own_clock());
    send_frame(m, &f);
}

static void answer_ping(const struct member *m, struct reader *r)
{
    struct frame f;
    read_array(r);
    read_uint(r);
    begin_record(&f, F_PONG, 3, m);
    frame_uint(&f, read_uint(r));
    frame_uint(&f, 0);
    send_frame(m, &f);
}

static void demand(struct member *m)
{
    struct frame f;
    begin_record(&f, F_DEMAND, 2, m);
    frame_array(&f, 1);
    frame_array(&f, 3);
    frame_uint(&f, 0);
    frame_uint(&f, (uint64_t)opt.messages);
    frame_uint(&f, m->granted);
    m->waiting = opt.messages;
    m->asked = now();
    send_frame(m, &f);
}

static void take_grant(struct member *m, struct reader *r)
{
    read_array(r);
    read_uint(r);  /* incarnation */
    read_uint(r);  /* ping_t */
    read_uint(r);  /* hold_us */
    for (unsigned records = read_array(r); records && !r->bad; records--) {
        unsigned fields = read_array(r);
        read_uint(r);
        long n = (long)read_uint(r);
        for (unsigned i = 2; i < fields; i++)
            read_int(r);
        m->granted += (uint32_t)n;
        m->waiting -= n;
        granted += n;
    }
    if (m->waiting < 0) {
        fputs("loadgen: more was granted than asked for\n", stderr);
        exit(1);
    }
    if (m->waiting == 0) {
        sample_add(&totals.round_trip_us, (now() - m->asked) * 1e6);
        demand(m);
    }
}

static void take_frame(struct member *m, unsigned type, const unsigned char *payload, size_t length)
{
    struct reader r = {payload, payload + length, false};
    if (type == F_GRANT)
        take_grant(m, &r);
    else if (type == F_PING)
        answer_ping(m, &r);
    r.bad |= type == F_ERROR;
    if (r.bad) {
        fprintf(stderr, "loadgen: a frame of type 0x%02x that cannot be read\n", type);
        exit(1);
    }
}

static void take_all(struct member *m)
{
    ssize_t got = recv(m->fd, m->in + m->have, FRAME_ROOM - m->have, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        die("a session has ended");
    m->have += (size_t)got;
    size_t at = 0;
    while (m->have - at >= FRAME_HEAD) {
        size_t length = frame_length(m->in + at);
        if (m->have - at < FRAME_HEAD + length)
            break;
        take_frame(m, m->in[at + 4], m->in + at + FRAME_HEAD, length);
        at += FRAME_HEAD + length;
    }
    m->have -= at;
    memmove(m->in, m->in + at, m->have);
}

void permits_begin(void)
{
    epoll_fd = epoll_create1(0);
    members = calloc((size_t)opt.fd_count, sizeof *members);
    for (int i = 0; i < opt.fd_count; i++) {
        members[i] = (struct member){.fd = opt.fds[i], .incarnation = opt.incarnations[i], .in = malloc(FRAME_ROOM)};
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &members[i]};
        if (!members[i].in || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, members[i].fd, &event))
            die("a session");
        demand(&members[i]);
    }
    permits_run(WARM_UP);
    totals.round_trip_us.count = 0;
}

long permits_run(double seconds)
{
    static double ping_at;
    long before = granted;
    for (double end = now() + seconds; now() < end;) {
        struct epoll_event events[EVENTS_PER_WAIT];
        if (now() >= ping_at) {
            ping_at = now() + 1;
            for (int i = 0; i < opt.fd_count; i++)
                ping(&members[i]);
        }
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, 20);
        for (int i = 0; i < count; i++)
            take_all(events[i].data.ptr);
    }
    return granted - before;
}
