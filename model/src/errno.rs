//! Errors as the kernel gives them: a number.
//!
//! There is no message, since there is none in the kernel either. What a caller is told beside the number it is told
//! through the structures of the call, as from KVM.

use std::fmt;

/// An error number, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(pub i32);

macro_rules! errors {
    ($($name:ident),*) => {
        #[allow(missing_docs)]
        impl Errno {
            $(pub const $name: Errno = Errno(libc::$name);)*

            fn name(self) -> Option<&'static str> {
                match self.0 {
                    $(libc::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errors!(
    EPERM, ENOENT, EINTR, EIO, EBADF, EAGAIN, ENOMEM, EFAULT, EBUSY, EEXIST, ENODEV, EINVAL, ENOTTY, ENOSPC,
    EOPNOTSUPP, EHWPOISON, E2BIG, EFBIG, ENOSYS, ESPIPE, EMFILE
);

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

/// What the kernel answers.
pub type Result<T> = std::result::Result<T, Errno>;
