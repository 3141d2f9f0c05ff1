/* Preloaded: reads of safetensors files fail in the way that the environment names, from the FAULT_AFTER-th on.
 *   short  every read gives at most half of what was asked for, in whole pages
 *   eintr  every other read is interrupted
 *   eio    one read reports a defective disk; those after it work again
 *   eof    reads find the end of the file
 * With mappings `eio` fails the advice that brings pages in. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static atomic_int reads;

static int is_weights(int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strstr(path, ".safetensors") != NULL;
}

static const char* fault_now(int* number) {
  const char* fault = getenv("FAULT");
  const char* after = getenv("FAULT_AFTER");
  *number = atomic_fetch_add(&reads, 1);
  return fault != NULL && *number >= (after == NULL ? 0 : atoi(after)) ? fault : "";
}

static ssize_t faulty_read(const char* name, int descriptor, void* target, size_t bytes, off_t offset) {
  ssize_t (*const real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, name);
  if (!is_weights(descriptor)) return real(descriptor, target, bytes, offset);
  int number;
  const char* fault = fault_now(&number);
  if (strcmp(fault, "short") == 0 && bytes > 8192) bytes = bytes / 2 / 4096 * 4096;
  if (strcmp(fault, "eintr") == 0 && number % 2 == 0) {
    errno = EINTR;
    return -1;
  }
  const char* after = getenv("FAULT_AFTER");
  if (strcmp(fault, "eio") == 0 && after != NULL && number == atoi(after)) {
    errno = EIO;
    return -1;
  }
  if (strcmp(fault, "eof") == 0) return 0;
  return real(descriptor, target, bytes, offset);
}

ssize_t pread(int descriptor, void* target, size_t bytes, off_t offset) {
  return faulty_read("pread", descriptor, target, bytes, offset);
}

ssize_t pread64(int descriptor, void* target, size_t bytes, off_t offset) {
  return faulty_read("pread64", descriptor, target, bytes, offset);
}

int madvise(void* address, size_t bytes, int advice) {
  int (*const real)(void*, size_t, int) = dlsym(RTLD_NEXT, "madvise");
  if (advice == MADV_POPULATE_READ) {
    int number;
    const char* after = getenv("FAULT_AFTER");
    if (strcmp(fault_now(&number), "eio") == 0 && after != NULL && number == atoi(after)) {
      errno = EFAULT; /* what the kernel answers where touching the page would raise SIGBUS */
      return -1;
    }
  }
  return real(address, bytes, advice);
}
