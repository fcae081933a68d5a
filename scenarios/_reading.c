/* The hot path of the load generator, compiled: what `scenarios/reading.py` says in Python, said in C.

   Both have the same two types and the same behaviour, which tests/test_hot_path.py compares byte by byte; the Python
   one is the one to read first. This one exists because a token costs the interpreter more than it costs the kernel.
   It builds against the stable ABI of Python 3.11, and where it cannot be built the Python one is used. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define READ_SIZE 65536
#define BATCH 256
#define ROUNDS 4
#define MANY 16 /* ready at once: to look again is cheaper than a turn of the loop */
#define DIGITS 5
#define EVENTS (EPOLLIN | EPOLLRDHUP | EPOLLET)

static int64_t in_ns(struct timespec t) { return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return in_ns(t);
}

/* -- Kept ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t stamp;
    uint32_t length;
} __attribute__((packed)) Mark;

/* One block of memory for each answer: with thousands of streams, every other one would cost a cache miss per token. */
typedef struct {
    PyObject_HEAD
    char *data; /* of each event a Mark, then its text */
    uint32_t count, size, room;
    uint32_t odd; /* not 0: some text has a quote, a backslash, or what is not printable ASCII */
    int64_t last_ns;
} Kept;

static int Kept_add(Kept *self, const char *text, Py_ssize_t length, int64_t stamp) {
    const Mark mark = {stamp, (uint32_t)length};
    const uint64_t size = self->size + sizeof mark + (uint64_t)length;
    if (size > self->room) {
        uint64_t room = self->room ? (uint64_t)self->room + self->room / 2 : 320;
        if (room < size) room = size;
        char *grown = room > UINT32_MAX ? NULL : PyMem_Realloc(self->data, room);
        if (!grown) {
            PyErr_NoMemory();
            return -1;
        }
        self->data = grown;
        self->room = (uint32_t)room;
    }
    memcpy(self->data + self->size, &mark, sizeof mark);
    memcpy(self->data + self->size + sizeof mark, text, length);
    uint32_t odd = 0;
    for (Py_ssize_t i = 0; i < length; i++)
        odd |= (text[i] < ' ') | (text[i] > '~') | (text[i] == '"') | (text[i] == '\\');
    self->odd |= odd;
    self->size = (uint32_t)size;
    self->count++;
    self->last_ns = stamp;
    return 0;
}

/* The text of the next event, and its mark; NULL behind the last. Begin with `at` = 0. */
static const char *Kept_next(const Kept *self, uint32_t *at, Mark *mark) {
    if (*at >= self->size) return NULL;
    memcpy(mark, self->data + *at, sizeof *mark);
    const char *text = self->data + *at + sizeof *mark;
    *at += (uint32_t)sizeof *mark + mark->length;
    return text;
}

static void Kept_dealloc(Kept *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyMem_Free(self->data);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static Py_ssize_t Kept_length(Kept *self) { return self->count; }

static PyObject *Kept_clear(Kept *self, PyObject *Py_UNUSED(none)) {
    PyMem_Free(self->data);
    self->data = NULL;
    self->count = self->size = self->room = self->odd = 0;
    Py_RETURN_NONE;
}

static PyObject *Kept_texts(Kept *self, PyObject *Py_UNUSED(none)) {
    PyObject *texts = PyList_New(self->count);
    Mark mark;
    const char *text;
    for (uint32_t at = 0, i = 0; texts && (text = Kept_next(self, &at, &mark)); i++) {
        PyObject *one = PyBytes_FromStringAndSize(text, mark.length);
        if (!one || PyList_SetItem(texts, i, one) < 0) Py_CLEAR(texts);
    }
    return texts;
}

static PyObject *Kept_joined(Kept *self, PyObject *Py_UNUSED(none)) {
    Py_ssize_t spaces = self->count ? self->count - 1 : 0;
    PyObject *joined = PyBytes_FromStringAndSize(NULL, self->size - self->count * (Py_ssize_t)sizeof(Mark) + spaces);
    char *to = joined ? PyBytes_AsString(joined) : NULL;
    Mark mark;
    const char *text;
    for (uint32_t at = 0; joined && (text = Kept_next(self, &at, &mark)); to += mark.length) {
        if (text != self->data + sizeof mark) *to++ = ' ';
        memcpy(to, text, mark.length);
    }
    return joined;
}

static PyObject *Kept_stamps(Kept *self, PyObject *since) {
    const int64_t start = PyLong_AsLongLong(since);
    if (start == -1 && PyErr_Occurred()) return NULL;
    PyObject *stamps = PyBytes_FromStringAndSize(NULL, self->count * (Py_ssize_t)sizeof(int64_t));
    char *to = stamps ? PyBytes_AsString(stamps) : NULL;
    Mark mark;
    for (uint32_t at = 0; stamps && Kept_next(self, &at, &mark); to += sizeof mark.stamp) {
        mark.stamp -= start;
        memcpy(to, &mark.stamp, sizeof mark.stamp);
    }
    return stamps;
}

static PyObject *Kept_last(Kept *self, void *Py_UNUSED(closure)) {
    return PyLong_FromLongLong(self->count ? self->last_ns : 0);
}

static PyObject *Kept_simple(Kept *self, void *Py_UNUSED(closure)) { return PyBool_FromLong(!self->odd); }

static PyMethodDef kept_methods[] = {
    {"clear", (PyCFunction)Kept_clear, METH_NOARGS, "Hold nothing."},
    {"texts", (PyCFunction)Kept_texts, METH_NOARGS, "Each text."},
    {"joined", (PyCFunction)Kept_joined, METH_NOARGS, "All texts with a space between two."},
    {"stamps", (PyCFunction)Kept_stamps, METH_O, "When each arrived, from a moment on: int64, native byte order."},
    {0},
};

static PyGetSetDef kept_values[] = {
    {"last_ns", (getter)Kept_last, NULL, "When the last arrived; 0 for none.", NULL},
    {"simple", (getter)Kept_simple, NULL, "Whether all are printable ASCII without quote or backslash.", NULL},
    {0},
};

static PyType_Slot kept_slots[] = {
    {Py_tp_doc, "Texts of plain events and when each arrived."},
    {Py_tp_dealloc, Kept_dealloc},
    {Py_tp_methods, kept_methods},
    {Py_tp_getset, kept_values},
    {Py_sq_length, Kept_length},
    {0},
};

static PyType_Spec kept_spec = {"scenarios._reading.Kept", sizeof(Kept), 0, Py_TPFLAGS_DEFAULT, kept_slots};

/* -- Reader -------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *connection;      /* null: nothing is read from this descriptor */
    int64_t read_ns;           /* when it was last read: what is read next came later */
    Kept *kept;                /* null: whatever arrives is handed on */
    PyObject *before, *after;  /* bytes around a plain event's text, from behind the size line to the chunk's end */
    const char *before_at, *after_at;
    Py_ssize_t before_size, after_size;
    char ten;                  /* the digit after 9 in a chunk's size: A or a */
} Lane;

typedef struct {
    PyObject_HEAD
    int epoll;
    int room;
    Lane *lanes; /* by descriptor */
    PyTypeObject *kept_type;
    char *buffer;
    int64_t offset_ns; /* of the monotonic clock from the wall clock, in which the kernel stamps */
    unsigned long long events, bytes; /* that were read: plain events, and other reads */
    PyObject *error, *error_value, *error_trace; /* what the next return from read raises */
} Reader;

static Lane *lane_of(Reader *self, int fd) {
    return fd >= 0 && fd < self->room && self->lanes[fd].connection ? &self->lanes[fd] : NULL;
}

static void lane_keep_all(Lane *lane) {
    Kept *kept = lane->kept;
    lane->kept = NULL;
    Py_XDECREF((PyObject *)kept);
    Py_CLEAR(lane->before);
    Py_CLEAR(lane->after);
}

/* The bytes of the plain event that `data` begins with; 0 when it does not. */
static Py_ssize_t plain_event(const Lane *lane, const char *data, Py_ssize_t size, const char **text,
                              Py_ssize_t *length) {
    Py_ssize_t digits = 0, event = 0;
    const char ten = lane->ten;
    const Py_ssize_t before = lane->before_size, after = lane->after_size;
    for (; digits < DIGITS && digits < size; digits++) {
        char c = data[digits];
        if (c >= '0' && c <= '9' && (digits || c != '0')) event = event * 16 + (c - '0');
        else if (c >= ten && c < ten + 6) event = event * 16 + (c - ten + 10);
        else break;
    }
    Py_ssize_t whole = digits + 2 + event + 2;
    if (!digits || whole > size || data[digits] != '\r' || data[digits + 1] != '\n') return 0;
    *length = event + 2 - before - after;
    *text = data + digits + 2 + before;
    if (*length < 1 || memcmp(*text - before, lane->before_at, before) ||
        memcmp(*text + *length, lane->after_at, after))
        return 0;
    return whole;
}

static int done(PyObject *connection, PyObject *result) {
    Py_DECREF(connection);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int hand_on(PyObject *connection, const char *method, const char *data, Py_ssize_t size, int64_t stamp) {
    Py_INCREF(connection); /* the call may close it */
    return done(connection, PyObject_CallMethod(connection, method, "y#L", data, size, (long long)stamp));
}

static int lost(PyObject *connection, int error) {
    Py_INCREF(connection);
    return done(connection, error ? PyObject_CallMethod(connection, "failed", "i", error)
                                  : PyObject_CallMethod(connection, "lost", "O", Py_None));
}

static int take(Reader *self, Lane *lane, const char *data, Py_ssize_t size, int64_t stamp) {
    const char *at = data, *end = at + size, *text;
    Py_ssize_t length, whole;
    self->bytes += size;
    while (lane->kept && at < end && (whole = plain_event(lane, at, end - at, &text, &length))) {
        if (Kept_add(lane->kept, text, length, stamp) < 0) return -1;
        at += whole;
        self->events++;
    }
    if (at == end) return 0;
    self->events++;
    return hand_on(lane->connection, lane->kept ? "other" : "received", at, end - at, stamp);
}

/* Keep the first Python error of a round: the other sockets that are ready are told of only once. */
static void note_error(Reader *self) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (self->error) {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return;
    }
    self->error = type;
    self->error_value = value;
    self->error_trace = trace;
}

enum { MORE, LESS, OVER }; /* after a read: there may be more; all was read that was there; nothing else will come */

/* When the kernel got the last of these bytes; `now` where it did not say. However the wall clock was set meanwhile: not
   before the last read. */
static int64_t arrived(Reader *self, Lane *lane, struct msghdr *message, int64_t now) {
    struct cmsghdr *said = CMSG_FIRSTHDR(message);
    int64_t stamp = now;
    if (said && said->cmsg_level == SOL_SOCKET && said->cmsg_type == SCM_TIMESTAMPNS) {
        struct timespec t;
        memcpy(&t, CMSG_DATA(said), sizeof t);
        stamp = in_ns(t) + self->offset_ns;
        if (stamp < lane->read_ns) stamp = lane->read_ns;
        if (stamp > now) stamp = now;
    }
    lane->read_ns = now;
    return stamp;
}

static int receive(Reader *self, int fd) {
    Lane *lane = lane_of(self, fd);
    if (!lane) return OVER; /* closed by what came before it in this round */
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(struct timespec))];
    } control;
    struct iovec bytes = {self->buffer, READ_SIZE};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    /* Not libc's recvmsg: in a process with threads that is a place to be cancelled at, which it costs more to be than
       to read so little. The same for epoll_pwait below. */
    ssize_t size = syscall(SYS_recvmsg, fd, &message, MSG_DONTWAIT);
    int error = size < 0 ? errno : 0;
    int64_t now = now_ns(CLOCK_MONOTONIC), stamp = size > 0 ? arrived(self, lane, &message, now) : now;
    if (error == EINTR) return MORE;
    if (error == EAGAIN || error == EWOULDBLOCK) return OVER;
    if ((size > 0 ? take(self, lane, self->buffer, size, stamp) : lost(lane->connection, error)) < 0)
        note_error(self);
    return size <= 0 ? OVER : size == READ_SIZE ? MORE : LESS;
}

/* Edge-triggered: the kernel need not look again at every socket that was just emptied. So it must be emptied, and an
   end that came together with the last bytes, of which nothing else would tell, must be looked for. */
static void read_one(Reader *self, int fd, uint32_t events) {
    for (int reads = 0; reads < MANY; reads++) {
        int state = receive(self, fd);
        if (state == OVER || (state == LESS && !(events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)))) return;
    }
    struct epoll_event again = {.events = EVENTS, .data.fd = fd}; /* a stream without end is not to starve the others */
    if (lane_of(self, fd)) epoll_ctl(self->epoll, EPOLL_CTL_MOD, fd, &again);
}

static PyObject *Reader_read(Reader *self, PyObject *Py_UNUSED(none)) {
    struct epoll_event ready[BATCH];
    const int64_t wall_ns = now_ns(CLOCK_REALTIME); /* first: held up in between, stamps come out late and never early */
    self->offset_ns = now_ns(CLOCK_MONOTONIC) - wall_ns;
    for (int round = 0; round < ROUNDS; round++) {
        /* It never waits: no other thread need run meanwhile. */
        int count = (int)syscall(SYS_epoll_pwait, self->epoll, ready, BATCH, 0, NULL, 8);
        if (count < 0 && errno != EINTR) return PyErr_SetFromErrno(PyExc_OSError);
        for (int i = 0; i < count; i++) read_one(self, ready[i].data.fd, ready[i].events);
        if (count < MANY) break; /* the loop's own turn costs less than to look in vain */
    }
    if (!self->error) Py_RETURN_NONE;
    PyErr_Restore(self->error, self->error_value, self->error_trace);
    self->error = self->error_value = self->error_trace = NULL;
    return NULL;
}

static PyObject *Reader_add(Reader *self, PyObject *args) {
    PyObject *connection;
    int fd;
    if (!PyArg_ParseTuple(args, "iO", &fd, &connection)) return NULL;
    if (fd < 0 || lane_of(self, fd)) return PyErr_Format(PyExc_ValueError, "descriptor %d cannot be added", fd);
    struct epoll_event event = {.events = EVENTS, .data.fd = fd};
    if (epoll_ctl(self->epoll, EPOLL_CTL_ADD, fd, &event) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    if (fd >= self->room) { /* only now: a number that is open is no larger than the limit of open files */
        int room = fd + 1 + self->room / 2;
        Lane *grown = PyMem_Realloc(self->lanes, room * sizeof(Lane));
        if (!grown) {
            epoll_ctl(self->epoll, EPOLL_CTL_DEL, fd, NULL);
            return PyErr_NoMemory();
        }
        memset(grown + self->room, 0, (room - self->room) * sizeof(Lane));
        self->lanes = grown;
        self->room = room;
    }
    Py_INCREF(connection);
    self->lanes[fd].connection = connection;
    self->lanes[fd].read_ns = now_ns(CLOCK_MONOTONIC);
    Py_RETURN_NONE;
}

static PyObject *Reader_keep_texts(Reader *self, PyObject *args) {
    PyObject *kept, *template;
    int fd;
    if (!PyArg_ParseTuple(args, "iO!O", &fd, self->kept_type, &kept, &template)) return NULL;
    PyObject *before = PyObject_GetAttrString(template, "before");
    PyObject *after = before ? PyObject_GetAttrString(template, "after") : NULL;
    PyObject *upper = after ? PyObject_GetAttrString(template, "upper") : NULL;
    int is_upper = upper ? PyObject_IsTrue(upper) : -1;
    Py_XDECREF(upper);
    if (is_upper >= 0 && !(PyBytes_Check(before) && PyBytes_Check(after))) {
        PyErr_Format(PyExc_TypeError, "a template is made of bytes");
        is_upper = -1;
    }
    Lane *lane = is_upper < 0 ? NULL : lane_of(self, fd); /* only now: what asked the template may have moved it */
    if (lane) {
        lane_keep_all(lane);
        Py_INCREF(kept);
        *lane = (Lane){
            .connection = lane->connection, .read_ns = lane->read_ns, .kept = (Kept *)kept,
            .before = before, .after = after,
            .before_at = PyBytes_AsString(before), .after_at = PyBytes_AsString(after),
            .before_size = PyBytes_Size(before), .after_size = PyBytes_Size(after), .ten = is_upper ? 'A' : 'a',
        };
        Py_RETURN_NONE;
    }
    Py_XDECREF(before);
    Py_XDECREF(after);
    if (is_upper < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *Reader_keep_all(Reader *self, PyObject *arg) {
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    Lane *lane = lane_of(self, (int)fd);
    if (lane) lane_keep_all(lane);
    Py_RETURN_NONE;
}

static PyObject *Reader_remove(Reader *self, PyObject *arg) {
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    Lane *lane = lane_of(self, (int)fd);
    if (!lane) Py_RETURN_NONE;
    lane_keep_all(lane);
    int gone = epoll_ctl(self->epoll, EPOLL_CTL_DEL, (int)fd, NULL) < 0;
    if (gone) PyErr_SetFromErrno(PyExc_OSError);
    Py_CLEAR(lane->connection); /* last: it may be the last to hold the socket */
    if (gone) return NULL;
    Py_RETURN_NONE;
}

static void release_all(Reader *self) {
    for (int fd = 0; fd < self->room; fd++) {
        lane_keep_all(&self->lanes[fd]);
        Py_CLEAR(self->lanes[fd].connection);
    }
    if (self->epoll >= 0) close(self->epoll);
    self->epoll = -1;
}

static PyObject *Reader_close(Reader *self, PyObject *Py_UNUSED(none)) {
    release_all(self);
    Py_RETURN_NONE;
}

static PyObject *Reader_fileno(Reader *self, PyObject *Py_UNUSED(none)) { return PyLong_FromLong(self->epoll); }

static PyObject *Reader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyTuple_Size(args) || (kwargs && PyDict_Size(kwargs)))
        return PyErr_Format(PyExc_TypeError, "Reader() takes no arguments");
    PyObject *module = PyType_GetModule(type);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Reader *self = module ? (Reader *)allocate(type, 0) : NULL;
    if (!self) return NULL;
    self->epoll = epoll_create1(EPOLL_CLOEXEC);
    self->kept_type = *(PyTypeObject **)PyModule_GetState(module);
    Py_INCREF((PyObject *)self->kept_type);
    self->buffer = PyMem_Malloc(READ_SIZE);
    if (self->epoll < 0) PyErr_SetFromErrno(PyExc_OSError);
    else if (!self->buffer) PyErr_NoMemory();
    else return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void Reader_dealloc(Reader *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    release_all(self);
    PyMem_Free(self->lanes);
    PyMem_Free(self->buffer);
    Py_XDECREF((PyObject *)self->kept_type);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef reader_methods[] = {
    {"read", (PyCFunction)Reader_read, METH_NOARGS, "Read whatever has bytes, without waiting."},
    {"add", (PyCFunction)Reader_add, METH_VARARGS, "Read from this descriptor from now on."},
    {"keep_texts", (PyCFunction)Reader_keep_texts, METH_VARARGS, "Of plain events on a descriptor keep the text."},
    {"keep_all", (PyCFunction)Reader_keep_all, METH_O, "Hand on whatever arrives again."},
    {"remove", (PyCFunction)Reader_remove, METH_O, "Read from it no more."},
    {"close", (PyCFunction)Reader_close, METH_NOARGS, "Stop; sockets are closed by their owners."},
    {"fileno", (PyCFunction)Reader_fileno, METH_NOARGS, "A descriptor that is readable while there is work."},
    {0},
};

static PyMemberDef reader_members[] = {
    {"events", T_ULONGLONG, offsetof(Reader, events), READONLY, "How many plain events, and other reads, were read."},
    {"bytes", T_ULONGLONG, offsetof(Reader, bytes), READONLY, "How many bytes were read."},
    {0},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_doc, "Receives, stamps and keeps, for every descriptor that has bytes."},
    {Py_tp_new, Reader_new},
    {Py_tp_dealloc, Reader_dealloc},
    {Py_tp_methods, reader_methods},
    {Py_tp_members, reader_members},
    {0},
};

static PyType_Spec reader_spec = {"scenarios._reading.Reader", sizeof(Reader), 0, Py_TPFLAGS_DEFAULT, reader_slots};

/* -- the module ---------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module) {
    PyTypeObject **kept = PyModule_GetState(module);
    *kept = (PyTypeObject *)PyType_FromModuleAndSpec(module, &kept_spec, NULL);
    if (!*kept || PyModule_AddType(module, *kept) < 0) return -1;
    PyObject *reader = PyType_FromModuleAndSpec(module, &reader_spec, NULL);
    int added = reader ? PyModule_AddType(module, (PyTypeObject *)reader) : -1;
    Py_XDECREF(reader);
    return added;
}

static int module_clear(PyObject *module) {
    Py_CLEAR(*(PyTypeObject **)PyModule_GetState(module));
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_reading", "The hot path, compiled (see scenarios/reading.py).", sizeof(PyTypeObject *),
    NULL, module_slots, NULL, module_clear, module_free,
};

PyMODINIT_FUNC PyInit__reading(void) { return PyModuleDef_Init(&definition); }
