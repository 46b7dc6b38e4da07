/* session.h - what the parts of a client session say to each other; main.c knows loadgen.h only.
 *
 * session.c moves octets and events; handshakes.c is the proxy's doors, channels.c its native one; dialogue.c is SMTP.
 */
#ifndef SESSION_H
#define SESSION_H

#include "loadgen.h"

#include <sys/epoll.h>

/* --- session.c --- */
extern enum goal session_goal;
void session_watch(struct session *s, int operation, uint32_t events);
void session_watch_fd(int fd, int operation, uint32_t events, struct session *s);
void session_finish(struct session *s, bool good);
/* Sends, and has the rest sent when the socket takes it. `data` must stay where it is unless it is as short as a command,
 * for which a socket always has room. False: the session is over. */
bool session_put(struct session *s, const char *data, size_t length);
void ask(struct session *s, enum step step, const char *text, int replies);  /* a command, on a channel in a frame */
void ask_octets(struct session *s, enum step step, const void *data, size_t length, int octets_due);
struct in_addr nth_address(struct in_addr first, long n);
struct in_addr next_source(void);

/* --- handshakes.c --- */
void handshake_begin(struct session *s);                    /* TCP stands */
void handshake_answer(struct session *s, const char *octets); /* all that were due */

/* --- channels.c --- */
void channels_begin(void);
void channel_start(struct session *s, double began);
void channel_end(struct session *s, bool good);
void channel_rest(struct session *s);                       /* no OPEN has come behind END */
void channel_octets(struct session *s, const char *data, size_t length);

/* --- dialogue.c --- */
void dialogue_init(void);
void dialogue_is_up(struct session *s);                     /* greeting and EHLO are behind us */
void dialogue_octets(struct session *s, const char *data, ssize_t length);
void dialogue_shake(struct session *s);

#endif
