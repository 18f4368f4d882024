// SPDX-License-Identifier: Apache-2.0
//! containerd's image records: names of manifests and indexes in its content store.

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    CreateImageRequest, GetImageRequest, Image, UpdateImageRequest,
};
use containerd_client::types::Descriptor as ContainerdDescriptor;
use prost_types::FieldMask;
use tonic::Code;

use super::{Containerd, ContainerdError, refused};
use crate::image::Descriptor;

/// A descriptor in containerd's words.
pub(crate) fn to_containerd(descriptor: &Descriptor) -> ContainerdDescriptor {
    ContainerdDescriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone().into_iter().collect(),
    }
}

impl Containerd {
    /// What a name stands for; `None` if there is no such record.
    pub(crate) async fn image(
        &self,
        name: &str,
    ) -> Result<Option<ContainerdDescriptor>, ContainerdError> {
        let request = self.request(GetImageRequest {
            name: name.to_owned(),
        });
        match ImagesClient::new(self.channel()).get(request).await {
            Ok(answer) => Ok(answer.into_inner().image.and_then(|image| image.target)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused("look for image", name)(status)),
        }
    }

    /// Creates the image record, or lets an existing one point to `target`.
    pub(crate) async fn put_image(
        &self,
        name: &str,
        target: ContainerdDescriptor,
    ) -> Result<(), ContainerdError> {
        let mut client = ImagesClient::new(self.channel());
        let image = Image {
            name: name.to_owned(),
            target: Some(target),
            ..Image::default()
        };
        let create = CreateImageRequest {
            image: Some(image.clone()),
            source_date_epoch: None,
        };
        match client.create(self.request(create)).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(refused("create image", name)(status)),
        }
        let update = UpdateImageRequest {
            image: Some(image),
            update_mask: Some(FieldMask {
                paths: vec!["target".to_owned()],
            }),
            source_date_epoch: None,
        };
        let updated = client.update(self.request(update)).await;
        updated.map(|_| ()).map_err(refused("update image", name))
    }
}
