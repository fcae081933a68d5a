/* The least that a client can do, for `client_bench.py`: what the kernel alone costs, below which nobody gets.

   floor PORT STREAMS REQUESTS < REQUEST

   It keeps STREAMS copies of the HTTP request on its standard input in flight until REQUESTS were answered. Of what it
   reads it only looks whether it ends as an answer does. No stamp, no parsing, no row: not a load generator. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define SILENCE_MS 20000
#define LAST "0\r\n\r\n"

static char request[1 << 20], buffer[1 << 16];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const int streams = atoi(argv[2]), one = 1;
    const struct sockaddr_in server = {
        .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const ssize_t size = (ssize_t)fread(request, 1, sizeof request, stdin);
    long unsent = atol(argv[3]), open = 0;
    int poll = epoll_create1(0);
    for (; open < streams && unsent > 0; open++, unsent--) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.fd = fd};
        if (connect(fd, (const struct sockaddr *)&server, sizeof server)) fail("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
        if (send(fd, request, size, 0) != size) fail("send");
    }
    struct epoll_event ready[256];
    while (open) {
        int count = epoll_wait(poll, ready, 256, SILENCE_MS);
        if (count <= 0) fail("epoll_wait");
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            ssize_t got = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
            if (got < 0 && errno == EAGAIN) continue;
            if (got <= 0) fail("recv");
            if (got < (ssize_t)strlen(LAST) || memcmp(buffer + got - strlen(LAST), LAST, strlen(LAST))) continue;
            if (unsent-- > 0) {
                if (send(fd, request, size, 0) != size) fail("send");
            } else {
                open--;
                close(fd);
            }
        }
    }
    return 0;
}
