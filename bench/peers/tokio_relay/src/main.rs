//! A plain egress relay on tokio: what a careful Rust programmer writes in an afternoon.
//!
//! `tokio_relay PROXY_PORT SOCKS_PORT`: PROXY v2 on the first port (leave from its source, go to its destination),
//! SOCKS5 without authentication on the second. One thread, so that it can be compared core by core.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::io::AsRawFd;

use tokio::io::{copy_bidirectional, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

fn refuse<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(ErrorKind::InvalidData, what))
}

fn ipv4(octets: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])
}

fn port(octets: &[u8]) -> u16 {
    u16::from_be_bytes([octets[0], octets[1]])
}

/// Without IP_BIND_ADDRESS_NO_PORT a bound source would take a port of its own before the destination is known.
fn bind_without_port(socket: &TcpSocket) {
    let on: libc::c_int = 1;
    unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT,
                         &on as *const _ as *const libc::c_void, 4);
    }
}

async fn connect(source: Option<Ipv4Addr>, destination: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(address) = source {
        bind_without_port(&socket);
        socket.bind(SocketAddr::from((address, 0)))?;
    }
    let stream = socket.connect(SocketAddr::V4(destination)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn proxy_protocol(client: &mut TcpStream) -> io::Result<TcpStream> {
    let mut header = [0u8; 28];
    client.read_exact(&mut header).await?;
    if &header[..16] != b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" {
        return refuse("not PROXY v2 over IPv4");
    }
    connect(Some(ipv4(&header[16..20])), SocketAddrV4::new(ipv4(&header[20..24]), port(&header[26..28]))).await
}

async fn socks5(client: &mut TcpStream) -> io::Result<TcpStream> {
    let mut methods = [0u8; 3];
    client.read_exact(&mut methods).await?;
    if methods != [5, 1, 0] {
        return refuse("only SOCKS5 without authentication");
    }
    client.write_all(&[5, 0]).await?;
    let mut request = [0u8; 10];
    client.read_exact(&mut request).await?;
    if request[..4] != [5, 1, 0, 1] {
        return refuse("only CONNECT to an IPv4 address");
    }
    let upstream = connect(None, SocketAddrV4::new(ipv4(&request[4..8]), port(&request[8..10]))).await?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    Ok(upstream)
}

async fn relay(mut client: TcpStream, socks: bool) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut upstream = if socks { socks5(&mut client).await? } else { proxy_protocol(&mut client).await? };
    copy_bidirectional(&mut client, &mut upstream).await?;
    Ok(())
}

async fn serve(port: u16, socks: bool) -> io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    let listener: TcpListener = socket.listen(4096)?;
    loop {
        let (client, _) = listener.accept().await?;
        tokio::spawn(relay(client, socks));
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let ports: Vec<u16> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    if ports.len() != 2 {
        return refuse("usage: tokio_relay PROXY_PORT SOCKS_PORT");
    }
    tokio::try_join!(serve(ports[0], false), serve(ports[1], true))?;
    Ok(())
}
