-- KumoMTA: part of init.lua. SOCKS5 is the better way (a refusal comes back with its reason); the proxy needs
--
--     listen_socks5 "10.0.0.1:1080"
--     allow_from 10.0.0.0/24
--     auth_shared_secret "PUT-THE-SECRET-OF-THE-PROXY-HERE"   # made by `openssl rand -hex 32`
--     source_ip 192.0.2.1, 192.0.2.2
--
-- and for the second source below: listen_proxy_protocol "10.0.0.1:808". What goes over the wire: kumomta_bytes.py.
-- In mode smtp messages are counted and connections shared (docs/smtp-mode.md). The proxy needs besides
--
--     mode smtp
--     source mail1 {
--         ip 192.0.2.1
--         ehlo mail1.example.com       # as ehlo_domain here
--     }
--
-- and enable_tls of make_egress_path stays "Opportunistic", its default: TLS to the receiver is the proxy's then.
-- Leave connect_timeout of make_egress_path at its default of 60 s: the proxy answers within 50 s.

local SOURCES = {
  ['mail1'] = {
    name = 'mail1',
    ehlo_domain = 'mail1.example.com',
    socks5_proxy_server = '10.0.0.1:1080',
    socks5_proxy_source_address = '192.0.2.1',
    -- Any name (it is the instance in the proxy's log), and the proxy's shared secret. A plain string in place of the
    -- table would be the name of a file that holds the secret.
    socks5_proxy_username = 'server-a',
    socks5_proxy_password = { key_data = 'PUT-THE-SECRET-OF-THE-PROXY-HERE' },
  },
  ['mail2'] = {
    name = 'mail2',
    ehlo_domain = 'mail2.example.com',
    -- PROXY protocol version 2, without a password: only allow_from protects this door.
    ha_proxy_server = '10.0.0.1:808',
    ha_proxy_source_address = '192.0.2.2',
  },
}

kumo.on('get_egress_source', function(source_name)
  local source = SOURCES[source_name]
  if source then
    return kumo.make_egress_source(source)
  end
  error('no such egress source: ' .. source_name)
end)
