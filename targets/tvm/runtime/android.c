/* Android's C library under the names that musl's headers, which this is compiled with, call it by. All else that
 * the library uses has the same name and types in both; see link.py. */
int *__errno(void);
int *__errno_location(void);

int *__errno_location(void) { return __errno(); }
