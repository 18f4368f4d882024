// SPDX-License-Identifier: Apache-2.0

use std::sync::Mutex;

use async_trait::async_trait;

use super::*;
use crate::registry::fake::{Access, FakeRegistry, Misbehaviour};
use crate::source::Class;

fn password(username: &str, password: &str) -> Credential {
    Credential::Password {
        username: username.into(),
        password: Secret::new(password),
    }
}

fn bearer(refusal: u16) -> Access {
    Access::Bearer {
        password: Some(("u".into(), "p".into())),
        identity: Some("it".into()),
        expires_in: 300,
        refusal,
    }
}

fn client_with(fake: &FakeRegistry, credentials: &[Credential]) -> RegistryClient {
    let given = credentials
        .iter()
        .fold(StaticCredentials::default(), |all, one| {
            all.with(&fake.host(), one.clone())
        });
    RegistryClient::new(quick_options(), Arc::new(given)).unwrap()
}

async fn setting(access: Access) -> (FakeRegistry, BlobDigest, Repository) {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "hello, blob");
    fake.set_access(access);
    let place = fake.place("team/app");
    (fake, blob, place)
}

async fn size(
    client: &RegistryClient,
    place: &Repository,
    blob: BlobDigest,
) -> Result<Option<u64>, RegistryError> {
    client.blob_size(&context(), place, blob).await
}

#[tokio::test]
async fn a_token_is_fetched_once_and_used_again() {
    let (fake, blob, place) = setting(bearer(401)).await;
    let client = client_with(&fake, &[password("u", "p")]);
    for _ in 0..3 {
        assert_eq!(size(&client, &place, blob).await.unwrap(), Some(11));
    }
    let head = format!("HEAD {}", blob_path("team/app", blob));
    let seen = fake.take_seen();
    assert_eq!(
        seen[1].query,
        "service=fake&scope=repository%3Ateam%2Fapp%3Apull"
    );
    assert_eq!(seen[1].authorization.as_deref(), Some("Basic dTpw"));
    assert_eq!(seen[2].authorization.as_deref(), Some("Bearer token-1"));
    let lines: Vec<_> = seen
        .iter()
        .map(|s| format!("{} {}", s.method, s.path))
        .collect();
    let token = "GET /token".to_owned();
    assert_eq!(
        lines,
        [head.clone(), token, head.clone(), head.clone(), head]
    );
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let (fake, blob, place) = setting(bearer(401)).await;
    let client = client_with(&fake, &[Credential::IdentityToken(Secret::new("it"))]);
    assert_eq!(size(&client, &place, blob).await.unwrap(), Some(11));
    let lines = fake.take_lines();
    assert_eq!(lines[1], "POST /token");
    assert_eq!(lines.len(), 3);
}

#[tokio::test]
async fn anonymous_tokens_work_where_they_are_given() {
    let anonymous = Access::Bearer {
        password: None,
        identity: None,
        expires_in: 300,
        refusal: 401,
    };
    let (fake, blob, place) = setting(anonymous).await;
    assert_eq!(
        size(&client(quick_options()), &place, blob).await.unwrap(),
        Some(11)
    );
    let seen = fake.take_seen();
    assert_eq!((seen.len(), seen[1].authorization.clone()), (3, None));
}

#[tokio::test]
async fn an_expired_token_is_renewed_once_on_401_and_403() {
    for refusal in [401, 403] {
        let (fake, blob, place) = setting(bearer(refusal)).await;
        let client = client_with(&fake, &[password("u", "p")]);
        size(&client, &place, blob).await.unwrap();
        fake.take_seen();
        fake.expire_tokens();
        assert_eq!(
            size(&client, &place, blob).await.unwrap(),
            Some(11),
            "{refusal}"
        );
        let head = format!("HEAD {}", blob_path("team/app", blob));
        assert_eq!(
            fake.take_lines(),
            [head.clone(), "GET /token".into(), head],
            "{refusal}"
        );
    }
}

#[tokio::test]
async fn a_refusal_for_good_is_denied_after_one_renewal() {
    let (fake, blob, place) = setting(bearer(401)).await;
    let client = client_with(&fake, &[password("u", "p")]);
    size(&client, &place, blob).await.unwrap();
    fake.take_seen();
    fake.misbehave(
        "HEAD",
        "/blobs/",
        0,
        u32::MAX,
        Misbehaviour::Status(403, None),
    );
    let error = size(&client, &place, blob).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Denied { status: 403, .. }),
        "{error}"
    );
    assert_eq!(error.class(), Class::Permanent);
    // Old token, new token, and the anonymous one is refused by the service.
    let head = format!("HEAD {}", blob_path("team/app", blob));
    let token = "GET /token".to_owned();
    assert_eq!(
        fake.take_lines(),
        [head.clone(), token.clone(), head, token]
    );
    let text = error.to_string();
    assert!(text.contains("user u") && !text.contains("dTpw"), "{text}");
}

#[tokio::test]
async fn a_token_near_its_end_is_not_used() {
    let short = Access::Bearer {
        password: None,
        identity: None,
        expires_in: 1,
        refusal: 401,
    };
    let (fake, blob, place) = setting(short).await;
    let client = client(quick_options());
    size(&client, &place, blob).await.unwrap();
    fake.take_seen();
    tokio::time::sleep(Duration::from_millis(800)).await;
    size(&client, &place, blob).await.unwrap();
    let head = format!("HEAD {}", blob_path("team/app", blob));
    assert_eq!(fake.take_lines(), ["GET /token".to_owned(), head]);
}

#[tokio::test]
async fn many_readers_share_one_token_request() {
    let (fake, blob, place) = setting(bearer(401)).await;
    let client = client_with(&fake, &[password("u", "p")]);
    let tokens = |fake: &FakeRegistry| {
        fake.take_lines()
            .iter()
            .filter(|line| line.ends_with("/token"))
            .count()
    };
    let burst = || futures::future::join_all((0..12).map(|_| size(&client, &place, blob)));
    for outcome in burst().await {
        assert_eq!(outcome.unwrap(), Some(11));
    }
    assert_eq!(tokens(&fake), 1);
    fake.expire_tokens();
    for outcome in burst().await {
        assert_eq!(outcome.unwrap(), Some(11));
    }
    assert_eq!(
        tokens(&fake),
        1,
        "a burst of refusals renews the token once"
    );
}

#[tokio::test]
async fn a_reader_that_leaves_does_not_stop_the_token_request() {
    let (fake, blob, place) = setting(bearer(401)).await;
    let client = client_with(&fake, &[password("u", "p")]);
    fake.misbehave(
        "GET",
        "/token",
        0,
        1,
        Misbehaviour::Status(503, Some("1".into())),
    );
    let leaving = async {
        let hurried =
            ReadContext::new(Priority::Foreground).with_timeout(Duration::from_millis(200));
        client.blob_size(&hurried, &place, blob).await
    };
    let (left, stayed) = tokio::join!(leaving, size(&client, &place, blob));
    assert!(matches!(left.unwrap_err(), RegistryError::DeadlineExceeded));
    assert_eq!(stayed.unwrap(), Some(11));
    assert_eq!(
        fake.take_lines()
            .iter()
            .filter(|line| line.ends_with("/token"))
            .count(),
        2
    );
}

#[tokio::test]
async fn credentials_are_tried_in_order_and_the_good_one_is_remembered() {
    let (fake, blob, place) = setting(bearer(401)).await;
    let client = client_with(&fake, &[password("u", "old"), password("u", "p")]);
    size(&client, &place, blob).await.unwrap();
    let given: Vec<_> = fake
        .take_seen()
        .into_iter()
        .filter(|seen| seen.path == "/token")
        .map(|seen| seen.authorization.unwrap())
        .collect();
    assert_eq!(given, ["Basic dTpvbGQ=", "Basic dTpw"]);
    fake.expire_tokens();
    size(&client, &place, blob).await.unwrap();
    assert_eq!(fake.take_seen().len(), 3, "the good one first");
}

#[tokio::test]
async fn basic_access_is_learnt_and_refused() {
    let basic = Access::Basic {
        username: "u".into(),
        password: "p".into(),
    };
    let (fake, blob, place) = setting(basic).await;
    let client = client_with(&fake, &[password("u", "p")]);
    size(&client, &place, blob).await.unwrap();
    size(&client, &place, blob).await.unwrap();
    assert_eq!(fake.take_seen().len(), 3, "one refusal, then known");
    let stranger = client_with(&fake, &[password("u", "wrong")]);
    let error = size(&stranger, &place, blob).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Denied { status: 401, .. }),
        "{error}"
    );
    assert_eq!(fake.take_seen().len(), 2);
}

/// Gives another password after a refresh, as a cloud's helper does.
#[derive(Debug)]
struct Rotating(Mutex<Vec<bool>>);

#[async_trait]
impl CredentialProvider for Rotating {
    async fn credentials(&self, _target: &CredentialTarget, refresh: bool) -> Vec<Credential> {
        self.0.lock().unwrap().push(refresh);
        vec![password("u", if refresh { "new" } else { "old" })]
    }
}

#[tokio::test]
async fn a_refusal_asks_for_new_credentials() {
    let old = Access::Basic {
        username: "u".into(),
        password: "old".into(),
    };
    let (fake, blob, place) = setting(old).await;
    let rotating = Arc::new(Rotating(Mutex::new(Vec::new())));
    let client = RegistryClient::new(quick_options(), rotating.clone()).unwrap();
    size(&client, &place, blob).await.unwrap();
    fake.set_access(Access::Basic {
        username: "u".into(),
        password: "new".into(),
    });
    fake.take_seen();
    size(&client, &place, blob).await.unwrap();
    assert_eq!(fake.take_seen().len(), 2, "refused, then let in");
    assert_eq!(*rotating.0.lock().unwrap(), [false, false, true]);
}

#[tokio::test]
async fn authorization_stays_at_home_when_redirected() {
    let (fake, blob, place) = setting(bearer(401)).await;
    fake.set_redirects(true);
    let client = client_with(&fake, &[password("u", "p")]);
    for _ in 0..2 {
        let read = client
            .blob_bytes(&context(), &place, blob, 100)
            .await
            .unwrap();
        assert_eq!(read, "hello, blob");
    }
    let seen = fake.take_seen();
    let (storage, home): (Vec<_>, Vec<_>) = seen.into_iter().partition(|seen| seen.storage);
    assert_eq!(storage.len(), 2);
    assert!(
        storage.iter().all(|seen| seen.authorization.is_none()),
        "{storage:?}"
    );
    assert!(
        home.iter()
            .any(|seen| seen.authorization.as_deref() == Some("Bearer token-1"))
    );
}

#[tokio::test]
async fn the_target_of_a_redirect_is_used_again_until_it_expires() {
    let (fake, blob, place) = setting(bearer(401)).await;
    fake.set_redirects(true);
    let client = client_with(&fake, &[password("u", "p")]);
    let read = async || {
        let context = context();
        let stream = client
            .open_blob(&context, &place, blob, 11, extent(0, 5))
            .await?;
        stream.collect(100).await.map_err(RegistryError::from)
    };
    let home = format!("GET {}", blob_path("team/app", blob));
    let storage = format!("storage GET /{blob}");
    assert_eq!(read().await.unwrap(), "hello");
    assert_eq!(
        fake.take_lines(),
        [
            home.clone(),
            "GET /token".into(),
            home.clone(),
            storage.clone()
        ]
    );
    assert_eq!(read().await.unwrap(), "hello");
    let direct = fake.take_lines();
    assert_eq!(
        direct.as_slice(),
        std::slice::from_ref(&storage),
        "straight to the storage"
    );
    fake.expire_redirects();
    assert_eq!(read().await.unwrap(), "hello");
    assert_eq!(
        fake.take_lines(),
        [storage.clone(), home.clone(), storage.clone()]
    );
    // A storage that refuses whatever it is given is asked again once, not for ever.
    for status in [400, 401, 403] {
        fake.misbehave("GET", "storage /", 0, 2, Misbehaviour::Status(status, None));
        let error = read().await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{error}");
        let asked = [storage.clone(), home.clone(), storage.clone()];
        assert_eq!(fake.take_lines(), asked, "{status}");
        read().await.unwrap();
        assert_eq!(fake.take_lines(), [home.clone(), storage.clone()]);
    }
}

#[tokio::test]
async fn redirects_end() {
    let (fake, blob, place) = setting(Access::Open).await;
    let loop_back = format!("http://{}{}", fake.host(), blob_path("team/app", blob));
    fake.misbehave(
        "GET",
        "/blobs/",
        0,
        u32::MAX,
        Misbehaviour::Redirect(loop_back),
    );
    let client = client(quick_options());
    let error = client
        .blob_bytes(&context(), &place, blob, 100)
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error}");
    assert_eq!(fake.take_seen().len(), MAX_REDIRECTS + 1);
    fake.behave();
    fake.misbehave(
        "GET",
        "/blobs/",
        0,
        1,
        Misbehaviour::Redirect("ftp://x.example/".into()),
    );
    let error = client
        .blob_bytes(&context(), &place, blob, 100)
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error}");
}

/// Counts look-ups, and knows nothing any more after so many.
#[derive(Debug)]
struct Forgetful {
    lookups: Mutex<usize>,
    good: usize,
}

#[async_trait]
impl CredentialProvider for Forgetful {
    async fn credentials(&self, _target: &CredentialTarget, _refresh: bool) -> Vec<Credential> {
        let mut lookups = self.lookups.lock().unwrap();
        *lookups += 1;
        if *lookups > self.good {
            return Vec::new();
        }
        vec![password("u", "p")]
    }
}

#[tokio::test]
async fn credentials_are_looked_up_when_they_are_needed_and_not_else() {
    let basic = Access::Basic {
        username: "u".into(),
        password: "p".into(),
    };
    for (access, by_token) in [(bearer(401), true), (basic, false)] {
        let (fake, blob, place) = setting(access).await;
        let provider = Arc::new(Forgetful {
            lookups: Mutex::new(0),
            good: 2,
        });
        let client = RegistryClient::new(quick_options(), provider.clone()).unwrap();
        let lookups = || *provider.lookups.lock().unwrap();
        for _ in 0..5 {
            assert_eq!(size(&client, &place, blob).await.unwrap(), Some(11));
        }
        assert_eq!(lookups(), 1, "{by_token}");
        if by_token {
            fake.expire_tokens();
            assert_eq!(size(&client, &place, blob).await.unwrap(), Some(11));
            assert_eq!(lookups(), 2);
            // From now on there are none: what is good still goes on.
            assert_eq!(size(&client, &place, blob).await.unwrap(), Some(11));
            fake.expire_tokens();
            size(&client, &place, blob).await.unwrap_err();
        }
    }
}
