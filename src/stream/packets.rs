//! Datagrams with the address that they were sent to, which tokio does not tell: a socket on a wildcard address needs it to find the
//! route, and to answer from the address that the client knows.

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, RawFd},
    ptr,
};

use socket2::SockAddr;

/// Room for one control message; of 64-bit words, as its header wants to be aligned.
type Control = [u64; 8];

/// A datagram that was received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    pub len: usize,
    pub from: SocketAddr,
    /// `None`: the kernel has not said.
    pub to: Option<IpAddr>,
}

/// Has the kernel tell with each datagram which address it was sent to.
pub fn ask_for_address(socket: &impl AsRawFd, v6: bool) -> io::Result<()> {
    let (level, option) = match v6 {
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
    };
    let on: libc::c_int = 1;
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes of `on`.
    let failed = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the next datagram; `WouldBlock` when there is none. What does not fit into `into` is lost.
pub fn receive(socket: RawFd, into: &mut [u8]) -> io::Result<Received> {
    let mut control = Control::default();
    let mut piece = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let receive = |name: *mut socket2::SockAddrStorage, length: *mut libc::socklen_t| {
        // SAFETY: all of it may be zero, and the pointers are to memory that outlives the call and is as long as said.
        let (n, header) = unsafe {
            let mut header: libc::msghdr = mem::zeroed();
            (header.msg_name, header.msg_namelen) = (name.cast(), *length);
            (header.msg_iov, header.msg_iovlen) = (&raw mut piece, 1);
            (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), size_of::<Control>() as _);
            let n = libc::recvmsg(socket, &raw mut header, 0);
            *length = header.msg_namelen;
            (n, header)
        };
        let len = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        Ok((len, address(&header)))
    };
    // SAFETY: the kernel has written the address and its length, or nothing was received.
    let ((len, to), from) = unsafe { SockAddr::try_init(receive) }?;
    let from = from.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(Received { len, from, to })
}

/// The address in a received header.
fn address(header: &libc::msghdr) -> Option<IpAddr> {
    // SAFETY: the kernel has filled the header's control messages, which are walked by the macros made for it; a value is read
    // only where its type says that it is one, and without regard to alignment.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while let Some(one) = message.as_ref() {
            let data = libc::CMSG_DATA(message);
            match (one.cmsg_level, one.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    return Some(Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr)).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    return Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                _ => message = libc::CMSG_NXTHDR(header, message),
            }
        }
    }
    None
}

/// Sends a datagram. `from`: the address that it comes from, where that is not the socket's own.
pub fn send(socket: RawFd, data: &[u8], to: SocketAddr, from: Option<IpAddr>) -> io::Result<usize> {
    let to = SockAddr::from(to);
    let mut control = Control::default();
    let mut piece = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: all of it may be zero, the pointers are to memory that outlives the call and is as long as said, and the kernel
    // only reads; `Control` holds the longer of the two messages.
    let n = unsafe {
        let mut header: libc::msghdr = mem::zeroed();
        (header.msg_name, header.msg_namelen) = (to.as_ptr().cast_mut().cast(), to.len());
        (header.msg_iov, header.msg_iovlen) = (&raw mut piece, 1);
        if let Some(from) = from {
            (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), size_of::<Control>() as _);
            header.msg_controllen = write_address(&header, from) as _;
        }
        libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes the only control message of a header, and says how long it is.
///
/// # Safety
/// The header's control buffer is one `Control`.
unsafe fn write_address(header: &libc::msghdr, from: IpAddr) -> libc::c_uint {
    // SAFETY: the buffer has room for a header and either value.
    unsafe {
        let message = libc::CMSG_FIRSTHDR(header);
        let data = libc::CMSG_DATA(message);
        let size = match from {
            IpAddr::V4(ip) => {
                let mut info: libc::in_pktinfo = mem::zeroed();
                info.ipi_spec_dst.s_addr = u32::from(ip).to_be();
                ptr::write_unaligned(data.cast(), info);
                ((*message).cmsg_level, (*message).cmsg_type) = (libc::IPPROTO_IP, libc::IP_PKTINFO);
                size_of::<libc::in_pktinfo>()
            }
            IpAddr::V6(ip) => {
                let mut info: libc::in6_pktinfo = mem::zeroed();
                info.ipi6_addr.s6_addr = ip.octets();
                ptr::write_unaligned(data.cast(), info);
                ((*message).cmsg_level, (*message).cmsg_type) = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);
                size_of::<libc::in6_pktinfo>()
            }
        } as libc::c_uint;
        (*message).cmsg_len = libc::CMSG_LEN(size) as _;
        libc::CMSG_SPACE(size)
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn the_address_that_a_client_knows_is_told_and_answered_from() {
        for (any, known) in [("0.0.0.0:0", "127.0.0.2"), ("[::]:0", "::1")] {
            let server = UdpSocket::bind(any).expect("a socket");
            let known: IpAddr = known.parse().expect("an address");
            ask_for_address(&server, known.is_ipv6()).expect("is asked for");
            let client = UdpSocket::bind((known, 0)).expect("a socket");
            client.connect((known, server.local_addr().unwrap().port())).expect("connects");
            client.send(b"hello").expect("is sent");
            let mut data = [0; 16];
            let got = receive(server.as_raw_fd(), &mut data).expect("is received");
            assert_eq!(
                (&data[..got.len], got.from, got.to),
                (&b"hello"[..], client.local_addr().unwrap(), Some(known))
            );
            // A connected socket takes nothing from another address.
            send(server.as_raw_fd(), b"back", got.from, got.to).expect("is sent");
            assert_eq!(client.recv(&mut data).expect("is received"), 4);
            send(server.as_raw_fd(), b"", got.from, got.to).expect("an empty one is a datagram, too");
            assert_eq!(client.recv(&mut data).expect("is received"), 0);
        }
    }
}
