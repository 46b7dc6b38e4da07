/* loadgen.h - what the parts of the load generator share.
 *
 * The program is one small SMTP world on loopback: a sink that answers like an MX, and clients that behave like an MTA
 * behind an egress proxy. It measures; it checks SMTP only as far as a wrong answer would spoil a measurement.
 */
#ifndef LOADGEN_H
#define LOADGEN_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_WATCHED = 64, MAX_FDS = 1024, EVENTS_PER_WAIT = 256, CHUNK = 256 * 1024, MAX_SECRET = 255 };

#define EHLO_NAME "mta1.sender.example.com"

enum handshake { HS_NONE, HS_V1, HS_V2, HS_SOCKS5, HS_NATIVE };

/* The command line, see usage() in main.c. */
struct options {
    struct sockaddr_in target;     /* the sink */
    struct sockaddr_in proxy;      /* where clients connect; equal to target without a proxy */
    struct in_addr first_source;   /* addresses that the proxy shall leave from, `sources` in a row */
    struct in_addr first_client;   /* addresses that the clients come from, `clients` in a row */
    int sources, clients;
    enum handshake handshake;
    const char *user, *password;   /* SOCKS5 (RFC 1929); NULL: offer no authentication */
    bool bind_first;               /* SOCKS5: KumoMTA's BIND names the source before CONNECT */
    int connections;
    long sessions;                 /* end after so many; 0: by time */
    double seconds;
    long warm_up;                  /* load: sessions before anything is measured, closed loop */
    bool beside;                   /* load: others send to the sink too */
    bool release;                  /* idle: the clients leave, what is kept without them is measured too */
    double rate;                   /* open loop: sessions (load) or questions (pingpong) a second; 0: closed loop */
    int messages;                  /* a session */
    size_t message_bytes;
    bool pipelining;
    double megabytes;              /* bulk, all connections together */
    bool download;                 /* bulk from the sink to the client */
    int watched[MAX_WATCHED], watched_count; /* roots of the process trees whose CPU and memory are reported */
    int sink_pid;
    const char *certificate, *key; /* the sink's, PEM files; NULL: no STARTTLS */
    int fds[MAX_FDS], fd_count;    /* native: connections that come authenticated; a session of SMTP takes one */
    uint32_t incarnations[MAX_FDS]; /* permits: of each of these sessions */
    bool starttls;                 /* the client does STARTTLS itself, through the proxy */
    bool brought_up;               /* native: the proxy reads the greeting, says EHLO and, behind the last message, QUIT */
};
extern struct options opt;

/* --- usage.c --- */
struct usage {
    double cpu;        /* seconds, user and system, with ended children */
    double system;     /* the system part of it, in clock ticks' resolution */
    double pss_kb, rss_kb;
    int processes;
};
double now(void);                                     /* seconds, monotonic */
struct usage tree_usage(const int *roots, int count, bool with_memory);
double machine_cpu(void);                             /* seconds, all cores, not idle */
double slab_kb(void);                                 /* kernel objects, sockets among them */
_Noreturn void die(const char *what);

/* --- sink.c --- */
struct sink_counts { long messages; long long octets; long connections, handshakes; };  /* octets with the final dots */
_Noreturn void run_sink(void);

/* --- session.c --- */
enum goal { GOAL_MAIL, GOAL_PARK };                   /* what a session does after EHLO: send mail and leave, or wait */

enum step {
    FREE, CONNECTING, OPENING, ENDING, SOCKS_METHOD, SOCKS_PASSWORD, SOCKS_BIND, SOCKS_CONNECT,
    GREETING, EHLO, STARTTLS, SHAKING, MAIL, RCPT, DATA, BODY, RSET, QUIT, PARKED, NOOP, UPLOAD, DOWNLOAD,
};

/* Native: a session's place has one channel for good; this is what one session of SMTP leaves to the next. */
struct channel {
    bool taken;
    unsigned char head[5]; /* of the frame that comes; ... */
    int head_octets;
    size_t frame_left;     /* ... octets of its payload that are still to come */
    bool end_unsaid;       /* END is due: the next OPEN goes with it, if there is one at once */
    bool ended_due;
};

struct session {
    int fd;
    struct channel channel;
    struct ssl_st *tls;    /* the MTA's own, with the receiver; NULL: in clear */
    enum step step;
    int replies_due;       /* complete SMTP replies still expected in this step; SOCKS: octets */
    int column;            /* in the current reply line */
    char code;             /* first digit of the current reply line */
    bool final_line;       /* "250 " rather than "250-" */
    int messages_sent;
    bool writing;          /* EPOLLOUT is watched */
    const char *rest;      /* of what is being written */
    size_t rest_bytes;
    int64_t bulk_left;
    double began, asked;
};

struct samples { float *value; size_t count, room; };  /* microseconds */

extern struct totals {
    long started, active, ready, done, errors, messages, round_trips;
    long leaving;   /* native: sessions that are over, and whose ENDED is to come: the channel is somebody's after us */
    struct samples session_us, setup_us, round_trip_us;
} totals;

void sessions_init(enum goal goal);
void session_start(struct session *s, double began);   /* `began` may lie in the past: open loop */
void session_ask(struct session *s, double asked);     /* NOOP on a parked session */
void session_quit(struct session *s);                  /* on a parked session */
void session_bulk(struct session *s, int64_t bytes);   /* on a parked session, the direction is opt.download */
bool wait_events(double timeout);                      /* handles what is there; false: nothing came */
extern void (*on_free)(struct session *s);             /* a session has ended */
extern void (*on_answer)(struct session *s);           /* a NOOP has been answered */

/* --- permits.c --- */
void permits_begin(void);                              /* has the clients ask, and warms up */
long permits_run(double seconds);                      /* how many came */

void sample_add(struct samples *s, double microseconds);
double sample_at(struct samples *s, double fraction);  /* sorts */

#endif
