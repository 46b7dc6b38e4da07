/* tls.h - TLS on a non-blocking socket, for the sink (STARTTLS) and for a client that does its own handshake.
 *
 * Every handshake is a full one: no tickets, no sessions kept, TLS 1.3. Nobody looks at certificates: they are made for
 * the run, and an MTA with opportunistic TLS does not either.
 */
#ifndef TLS_H
#define TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct ssl_st;

enum shaking { TLS_AGAIN, TLS_DONE, TLS_FAILED };

void tls_server(const char *certificate, const char *key);  /* PEM files; from here on tls_new makes the server's side */
void tls_client(void);
struct ssl_st *tls_new(int fd);
void tls_free(struct ssl_st *tls);                           /* NULL: nothing */
enum shaking tls_shake(struct ssl_st *tls);

/* As recv(2) and send(2): the octets, 0 at the end, or -1 with errno, EAGAIN where the socket has no more to give or to
 * take. What OpenSSL holds back of a record shows no event: read until EAGAIN. */
ssize_t tls_recv(struct ssl_st *tls, void *buffer, size_t length);
ssize_t tls_send(struct ssl_st *tls, const void *data, size_t length);

extern double tls_seconds;  /* CPU time that this process has spent on handshakes, their system calls included; not on data */

#endif
